#include "core/delta_log.h"

#include <algorithm>
#include <numeric>

namespace disagg {

void DeltaLog::append(Event event) {
  events_.push_back(event);
  if (events_.size() < cancel_at_) return;
  cancel(events_);
  cancel_at_ = std::max<std::size_t>(4096, 2 * events_.size());
}

// Keeps the last event of every hash whose events do not sum to nothing, in the order they came.
// That order keeps parents before children: a child stored now is stored after its parent was last.
void DeltaLog::cancel(std::vector<Event>& events) {
  const auto num_stored =
      std::count_if(events.begin(), events.end(), [](const Event& event) { return event.stored; });
  if (num_stored == 0 || static_cast<std::size_t>(num_stored) == events.size()) return;

  std::vector<std::size_t> order(events.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&events](std::size_t a, std::size_t b) {
    return events[a].hash != events[b].hash ? events[a].hash < events[b].hash : a < b;
  });
  std::vector<bool> keep(events.size(), false);
  for (std::size_t i = 0; i < order.size();) {
    const PageHash hash = events[order[i]].hash;
    std::ptrdiff_t net = 0;
    std::size_t last = 0;
    for (; i < order.size() && events[order[i]].hash == hash; ++i) {
      last = order[i];
      net += events[last].stored ? 1 : -1;
    }
    keep[last] = net != 0;
  }
  std::size_t kept = 0;
  for (std::size_t i = 0; i < events.size(); ++i) {
    if (keep[i]) events[kept++] = events[i];
  }
  events.resize(kept);
}

DeltaLog::Delta DeltaLog::pending() const {
  std::vector<Event> net = events_;
  cancel(net);
  Delta delta{seq_, {}, {}};
  for (const Event& event : net) (event.stored ? delta.stored : delta.removed).push_back(event.hash);
  return delta;
}

DeltaLog::Delta DeltaLog::drain() {
  Delta delta = pending();
  events_.clear();
  if (delta.stored.empty() && delta.removed.empty()) return delta;
  delta.seq = ++seq_;
  drained_.count += delta.stored.size() - delta.removed.size();
  for (const PageHash hash : delta.stored) drained_.xor_of_all ^= hash;
  for (const PageHash hash : delta.removed) drained_.xor_of_all ^= hash;
  return delta;
}

}  // namespace disagg
