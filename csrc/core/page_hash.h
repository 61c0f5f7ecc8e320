// Chained 64-bit hashes of the full pages of a prompt.
//
// The hash of page i covers the salt, the page size and every token of pages 0..i, so equal hashes
// mean equal prefixes up to chance (2^-64 a pair), and one hash names a whole prefix. Hashes only
// route: whoever serves KV compares the tokens themselves, so a collision, even a crafted one, costs
// a wasted route and never a wrong answer.
//
// The value is part of what routers and workers say to each other: both sides compute it, on
// little-endian machines. Changing it is a change of protocol.
//
// Threading: free functions without state.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace disagg {

// One token of a vocabulary. Any value hashes; zero and up hash best (see page_hash.cpp).
using Token = std::int32_t;
using PageHash = std::uint64_t;

// Returns the state before the first page. Different salts never share a prefix.
[[nodiscard]] PageHash seed_of(std::string_view salt, std::size_t page_size);

// Hashes the pages that follow `previous` (a page's hash or a seed) into `out`.
// Requires: page_size > 0; tokens.size() >= out.size() * page_size. Tokens past that are ignored.
// Cost: one pass, about 0.1 ns a byte.
void page_hashes(PageHash previous, std::span<const Token> tokens, std::size_t page_size,
                 std::span<PageHash> out);

}  // namespace disagg
