#include "text/regex_parse.h"

#include "system/error.h"

namespace mnemos {
namespace {

constexpr int deepest = 50;
constexpr uint32_t most_repeats = 1000;

class Parser {
 public:
  explicit Parser(std::string_view pattern) : pattern_(pattern) {}

  RegexNode parse() {
    RegexNode node = choice(0, false);
    if (at_ < pattern_.size()) refuse("an unmatched )");
    return node;
  }

 private:
  [[noreturn]] void refuse(const std::string &what) const {
    throw unsupported_error("the regular expression " + std::string(pattern_.substr(0, 200)) + " has " + what +
                            " at byte " + std::to_string(at_));
  }
  bool more() const { return at_ < pattern_.size(); }
  bool follows(std::string_view text) const { return pattern_.substr(at_, text.size()) == text; }
  bool take(std::string_view text) {
    if (!follows(text)) return false;
    at_ += text.size();
    return true;
  }

  RegexNode choice(int depth, bool any_case) {
    if (depth > deepest) refuse("too many groups in each other");
    RegexNode node;
    node.kind = RegexNode::choice;
    do node.parts.push_back(sequence(depth, any_case));
    while (take("|"));
    return node.parts.size() == 1 ? std::move(node.parts[0]) : node;
  }

  RegexNode sequence(int depth, bool any_case) {
    RegexNode node;
    node.kind = RegexNode::sequence;
    char last = 0;  // a letter that stands by itself just before, where case is ignored
    while (more() && !follows("|") && !follows(")")) {
      const char letter = pattern_[at_];
      if (any_case && last) check_pair(last, letter);
      RegexNode part = atom(depth, any_case);
      const bool single = part.kind == RegexNode::set;
      while (quantify(part)) {
      }
      last = single && part.kind == RegexNode::set ? letter : 0;
      node.parts.push_back(std::move(part));
    }
    return node.parts.size() == 1 ? std::move(node.parts[0]) : node;
  }

  // Two letters that are also a single character, such as a ligature, where case is ignored.
  void check_pair(char first, char second) {
    for (const char *pair : {"ff", "fi", "fl", "ss", "st"})
      if ((first | 32) == pair[0] && (second | 32) == pair[1]) refuse("letters with a ligature, case ignored");
  }

  RegexNode atom(int depth, bool any_case) {
    if (take("(")) return group(depth, any_case);
    if (take("[")) return set(with_cases(class_(depth), any_case));
    if (take(".")) return set(~CharacterSet::range('\n', '\n'));
    if (take("^")) return place(RegexStep::at_line_begin);
    if (take("$")) return place(RegexStep::at_line_end);
    if (follows("*") || follows("+") || follows("?")) refuse("nothing to repeat");
    if (take("\\A")) return place(RegexStep::at_begin);
    if (take("\\z")) return place(RegexStep::at_end);
    if (take("\\Z")) return place(RegexStep::at_last);
    if (take("\\b")) return place(RegexStep::at_boundary);
    if (take("\\B")) return place(RegexStep::inside_word);
    char32_t c;
    CharacterSet found;
    if (!character(c, found)) return set(with_cases(found, any_case));
    return set(with_cases(CharacterSet::range(c, c), any_case));
  }

  RegexNode group(int depth, bool any_case) {
    RegexNode node;
    if (take("?=") || take("?!") || take("?<=") || take("?<!")) {
      node.kind = RegexNode::look;
      node.negated = pattern_[at_ - 1] == '!';
      node.behind = pattern_[at_ - 2] == '<';
    } else if (take("?>")) {
      node.kind = RegexNode::atomic;
    } else if (take("?i:")) {
      any_case = true;
    } else if (!take("?:") && follows("?")) {
      refuse("a group of an unknown kind");
    }
    RegexNode body = choice(depth + 1, any_case);
    if (!take(")")) refuse("a group without an end");
    if (node.kind == RegexNode::empty) {  // a set by itself stays one, for what repeats it
      if (body.kind == RegexNode::set || body.kind == RegexNode::choice) return body;
      node.kind = RegexNode::sequence;
    }
    if (node.behind && body.kind != RegexNode::set) refuse("a look behind at more than a character");
    node.parts.push_back(std::move(body));
    return node;
  }

  bool quantify(RegexNode &part) {
    uint32_t least = 0, most = RegexNode::unbounded;
    const size_t begin = at_;
    bool counted = false;
    if (take("+")) {
      least = 1;
    } else if (take("?")) {
      most = 1;
    } else if (take("{")) {
      counted = true;
      const bool has_least = number(least);
      if (!take(","))
        most = least;
      else if (!number(most))
        most = RegexNode::unbounded;
      if (!has_least || !take("}")) at_ = begin, refuse("a brace");
      if (most < least) refuse("a repetition with no length");
    } else if (!take("*")) {
      return false;
    }
    if (part.kind == RegexNode::place || part.kind == RegexNode::look) refuse("a repeated place");
    RegexNode node;
    node.kind = RegexNode::repeat;
    node.least = least, node.most = most;
    if (counted && (follows("?") || follows("+"))) refuse("a counted repetition with a mode");
    if (!counted && take("?"))
      node.mode = RegexNode::lazy;
    else if (!counted && take("+"))
      node.mode = RegexNode::possessive;
    node.parts.push_back(std::move(part));
    part = std::move(node);
    return true;
  }

  bool number(uint32_t &value) {
    const size_t begin = at_;
    value = 0;
    for (; more() && pattern_[at_] >= '0' && pattern_[at_] <= '9'; at_++) {
      value = value * 10 + static_cast<uint32_t>(pattern_[at_] - '0');
      if (value > most_repeats) refuse("a number above " + std::to_string(most_repeats));
    }
    return at_ > begin;
  }

  // After [: the members up to ]
  CharacterSet class_(int depth) {
    if (depth > deepest) refuse("too many classes in each other");
    const bool negated = take("^");
    if (follows("]")) refuse("an empty class");
    CharacterSet whole = CharacterSet::all(), part;
    bool was_character = false;
    char32_t last = 0;
    for (bool first = true; !take("]"); first = false) {
      if (!more()) refuse("a class without an end");
      if (take("&&")) {
        whole = whole & part;
        part = CharacterSet();
        was_character = false;
      } else if (follows("[:")) {
        refuse("a class with a name");
      } else if (take("[")) {
        part = part | class_(depth + 1);
        was_character = false;
      } else if (follows("-") && !first && !follows("-]")) {
        at_++;
        char32_t to;
        CharacterSet found;
        if (!was_character || follows("[") || follows("&&") || !character(to, found) || to < last)
          refuse("a range that is none");
        part = part | CharacterSet::range(last, to);
        was_character = false;
      } else {
        CharacterSet found;
        was_character = character(last, found);
        part = part | (was_character ? CharacterSet::range(last, last) : found);
      }
    }
    whole = whole & part;
    return negated ? ~whole : whole;
  }

  // A character, or false and a set that has a name.
  bool character(char32_t &c, CharacterSet &found) {
    if (!more()) refuse("no end");
    if (!take("\\")) {
      c = next_character(pattern_, at_);
      return true;
    }
    if (!more()) refuse("a backslash");
    const char letter = pattern_[at_++];
    switch (letter) {
      case 'n': c = '\n'; return true;
      case 'r': c = '\r'; return true;
      case 't': c = '\t'; return true;
      case 'f': c = '\f'; return true;
      case 'v': c = '\v'; return true;
      case 'u': c = hexadecimal(4, 4); return true;
      case 'x':
        if (!take("{")) {
          c = hexadecimal(2, 2);
          if (c > 0x7F) refuse("a byte");
          return true;
        }
        c = hexadecimal(1, 6);
        if (!take("}")) refuse("a brace");
        return true;
      case 's': found = CharacterSet::flag(1); return false;
      case 'S': found = ~CharacterSet::flag(1); return false;
      case 'w': found = CharacterSet::flag(0); return false;
      case 'W': found = ~CharacterSet::flag(0); return false;
      case 'd': CharacterSet::find_property("Nd", found); return false;
      case 'D':
        CharacterSet::find_property("Nd", found);
        found = ~found;
        return false;
      case 'p':
      case 'P': found = property(letter == 'P'); return false;
    }
    if ((letter >= '0' && letter <= '9') || (letter >= 'A' && letter <= 'Z') || (letter >= 'a' && letter <= 'z') ||
        static_cast<uint8_t>(letter) >= 0x80)
      refuse("an unknown escape");
    c = static_cast<uint8_t>(letter);
    return true;
  }

  char32_t hexadecimal(int least, int most) {
    char32_t value = 0;
    int digits = 0;
    for (; digits < most && more(); digits++, at_++) {
      const char d = pattern_[at_];
      if (d >= '0' && d <= '9')
        value = value * 16 + static_cast<char32_t>(d - '0');
      else if ((d | 32) >= 'a' && (d | 32) <= 'f')
        value = value * 16 + static_cast<char32_t>((d | 32) - 'a' + 10);
      else
        break;
    }
    if (digits < least || value >= code_points) refuse("a number of a character");
    return value;
  }

  CharacterSet property(bool negated) {
    if (!take("{")) refuse("a property without a name");
    if (take("^")) negated = !negated;
    const size_t end = pattern_.find('}', at_);
    CharacterSet found;
    if (end == std::string_view::npos || !CharacterSet::find_property(pattern_.substr(at_, end - at_), found))
      refuse("an unknown property");
    at_ = end + 1;
    return negated ? ~found : found;
  }

  // With the other case of its letters; beyond ASCII two characters fold to one of them.
  CharacterSet with_cases(CharacterSet set, bool any_case) {
    if (!any_case) return set;
    if (set.overlaps(CharacterSet::range(0x80, code_points - 1))) refuse("more than ASCII, case ignored");
    set.finish();
    CharacterSet result = set;
    for (char32_t c = 'a'; c <= 'z'; c++) {
      if (!set.contains(c) && !set.contains(c - 32)) continue;
      result = result | CharacterSet::range(c, c) | CharacterSet::range(c - 32, c - 32);
      if (c == 's') result = result | CharacterSet::range(0x17F, 0x17F);
      if (c == 'k') result = result | CharacterSet::range(0x212A, 0x212A);
    }
    return result;
  }

  static RegexNode set(CharacterSet characters) {
    RegexNode node;
    node.kind = RegexNode::set;
    node.characters = std::move(characters);
    return node;
  }
  static RegexNode place(RegexStep::Op where) {
    RegexNode node;
    node.kind = RegexNode::place;
    node.where = where;
    return node;
  }

  std::string_view pattern_;
  size_t at_ = 0;
};

}  // namespace

RegexNode parse_regex(std::string_view pattern) { return Parser(pattern).parse(); }

}  // namespace mnemos
