#include "core/page_hash.h"

#include <algorithm>
#include <cstring>

namespace disagg {
namespace {

__extension__ using Wide = unsigned __int128;

// Random odd numbers with bits 31 and 63 set. Token ids have neither bit, so `tokens ^ secret` is
// never zero: a zero factor would wipe out whatever the other factor had gathered.
constexpr std::uint64_t kTokenSecret = 0xa0761d64f8bd642fULL;
constexpr std::uint64_t kTailSecret = 0xe7037ed1a0b428dbULL;
constexpr std::uint64_t kChainSecret = 0x8ebc6af0dc88c6e3ULL;
constexpr std::uint64_t kSaltSecret = 0x9e3779b9ff4a7c15ULL;

// Multiplies to 128 bits and folds: every bit of the result depends on every bit of both factors.
inline std::uint64_t mix(std::uint64_t a, std::uint64_t b) {
  const Wide product = static_cast<Wide>(a) * b;
  return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
}

inline std::uint64_t load(const void* from, std::size_t num_bytes) {
  std::uint64_t value = 0;
  std::memcpy(&value, from, num_bytes);
  return value;
}

// The page alone, apart from what came before it. Kept off the chain so that the processor works on
// several pages at once, and only one multiplication a page waits for the page before.
inline std::uint64_t content_hash(const Token* tokens, std::size_t count) {
  std::uint64_t state = kChainSecret;
  std::size_t i = 0;
  for (; i + 4 <= count; i += 4) {
    state = mix(load(tokens + i, 8) ^ kTokenSecret, load(tokens + i + 2, 8) ^ state);
  }
  if (const std::size_t rest = count - i; rest > 0) {
    const std::uint64_t low = load(tokens + i, std::min<std::size_t>(rest, 2) * sizeof(Token));
    const std::uint64_t high = rest > 2 ? load(tokens + i + 2, sizeof(Token)) : 0;
    state = mix(low ^ kTailSecret, high ^ state);
  }
  return state;
}

}  // namespace

PageHash seed_of(std::string_view salt, std::size_t page_size) {
  std::uint64_t state = mix(page_size ^ kSaltSecret, salt.size() ^ kChainSecret);
  for (std::size_t i = 0; i < salt.size(); i += 8) {
    const std::size_t num_bytes = std::min<std::size_t>(salt.size() - i, 8);
    state = mix(load(salt.data() + i, num_bytes) ^ kTailSecret, state ^ kTokenSecret);
  }
  return state;
}

void page_hashes(PageHash previous, std::span<const Token> tokens, std::size_t page_size,
                 std::span<PageHash> out) {
  const Token* page = tokens.data();
  for (PageHash& hash : out) {
    previous = mix(previous ^ kTailSecret, content_hash(page, page_size) ^ kSaltSecret);
    hash = previous;
    page += page_size;
  }
}

}  // namespace disagg
