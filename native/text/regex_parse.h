// A regular expression as a tree.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "text/character_set.h"
#include "text/regex.h"

namespace mnemos {

struct RegexNode {
  enum Kind : uint8_t { empty, set, sequence, choice, repeat, look, atomic, place };
  enum Mode : uint8_t { greedy, lazy, possessive };
  static constexpr uint32_t unbounded = ~0u;

  Kind kind = empty;
  std::vector<RegexNode> parts;  // one for repeat, look and atomic
  CharacterSet characters;  // of a set
  uint32_t least = 0, most = 0;  // of a repeat
  Mode mode = greedy;  // of a repeat
  bool behind = false, negated = false;  // of a look
  RegexStep::Op where = RegexStep::at_begin;  // of a place
};

// Throws Error (unsupported).
RegexNode parse_regex(std::string_view pattern);

}  // namespace mnemos
