// Grouping of tokens by the nodes that they visit, run on the host, against a stable sort.
#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "../../cuda/walkers.cuh"
#include "cuda_host.h"

namespace fff::cuda {
namespace {

// Groups the tokens of each tree by 5 levels of random positions, 3 and then 2 of them.
void expect_sorted(int64_t tokens, int64_t trees, bool complete, bool summed, Order order) {
  SCOPED_TRACE(testing::Message() << tokens << " tokens, " << trees << " trees, complete "
                                  << complete << ", summed " << summed);
  std::mt19937 random(1);
  std::vector<int64_t> positions(tokens * trees);
  for (int64_t& position : positions) {
    position = std::uniform_int_distribution<int64_t>(complete ? 0 : -9, 31)(random);
  }
  const Walkers walkers = {trees, 1, 1, positions.data(), complete};
  HostQueue queue(order);
  Grouping grouping = {tokens, trees, 0, nullptr, nullptr};
  for (const int levels : {3, 2}) {
    Grouping next = grouping;
    next.level += levels;
    const int64_t counts = grouping.tiles() << levels;
    const Children children = {levels, queue.array<int32_t>(counts + 1),
                               queue.array<uint16_t>(grouping.pairs())};
    int32_t* const starts = queue.array<int32_t>(next.groups() + 1);
    int32_t* const sorted = queue.array<int32_t>(grouping.pairs());
    queue.launch(RouteWalkers{grouping, children, walkers, 5}, grouping.tiles(),
                 RouteWalkers::kSharedBytes);
    if (summed) {
      queue.exclusive_sum(children.counts, counts + 1);
    }
    queue.launch(Regroup{grouping, children, summed, starts, sorted}, grouping.tiles(),
                 Regroup::kSharedBytes);
    next.starts = starts;
    next.order = sorted;
    grouping = next;
  }
  int64_t pair = 0;
  for (int64_t group = 0; group < grouping.groups(); ++group) {
    EXPECT_EQ(grouping.starts[group], pair);
    for (int64_t token = 0; token < tokens; ++token) {
      if (positions[token * trees + grouping.tree(group)] == grouping.position(group)) {
        EXPECT_EQ(grouping.order[pair], token) << "pair " << pair;
        ++pair;
      }
    }
  }
  EXPECT_EQ(grouping.starts[grouping.groups()], pair);
}

TEST(CudaGrouping, IsStable) {
  for (const Order order : kOrders) {
    for (const int64_t tokens : {1, 128, 700}) {
      for (const int64_t trees : {1, 3}) {
        expect_sorted(tokens, trees, true, false, order);
        expect_sorted(tokens, trees, true, true, order);
        expect_sorted(tokens, trees, false, true, order);
      }
    }
  }
}

}  // namespace
}  // namespace fff::cuda
