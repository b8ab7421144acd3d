// From a regular expression's tree to steps.
#include "system/error.h"
#include "text/regex_parse.h"

namespace mnemos {
namespace {

constexpr size_t most_program_steps = 20000;

// How the matches of a node begin.
struct Beginning {
  CharacterSet set;  // their first characters
  bool empty = false;  // there may be none
  bool asserts = false;  // a place or a look is checked before the first character
};

Beginning beginning_of(const RegexNode &node) {
  Beginning result;
  switch (node.kind) {
    case RegexNode::empty: result.empty = true; break;
    case RegexNode::set: result.set = node.characters; break;
    case RegexNode::place:
    case RegexNode::look: result.empty = result.asserts = true; break;
    case RegexNode::atomic: return beginning_of(node.parts[0]);
    case RegexNode::repeat:
      result = beginning_of(node.parts[0]);
      result.empty = result.empty || node.least == 0;
      break;
    case RegexNode::choice:
      for (const RegexNode &part : node.parts) {
        const Beginning one = beginning_of(part);
        result.set = result.set | one.set;
        result.empty |= one.empty, result.asserts |= one.asserts;
      }
      break;
    case RegexNode::sequence:
      result.empty = true;
      for (const RegexNode &part : node.parts) {
        const Beginning one = beginning_of(part);
        result.set = result.set | one.set;
        result.asserts |= one.asserts;
        if (!one.empty) {
          result.empty = false;
          break;
        }
      }
  }
  return result;
}

}  // namespace

class RegexEmitter {
 public:
  explicit RegexEmitter(Regex &regex) : regex_(regex) {}

  void program(const RegexNode &node) {
    Beginning begins = beginning_of(node);
    if (begins.empty) throw unsupported_error("a regular expression that matches nothing at all is not supported");
    begins.set.finish();
    regex_.first_ = begins.set;
    emit(node, CharacterSet());
    add(RegexStep::done);
  }

 private:
  // `follow` has every character that what comes after the node can begin with; it is empty where nothing comes.
  void emit(const RegexNode &node, const CharacterSet &follow) {
    switch (node.kind) {
      case RegexNode::empty: break;
      case RegexNode::set: add(RegexStep::set, set(node.characters)); break;
      case RegexNode::place: add(node.where); break;
      case RegexNode::sequence: {
        for (size_t i = 0; i < node.parts.size(); i++) emit(node.parts[i], follow_of(node, i + 1, follow));
        break;
      }
      case RegexNode::choice: choice(node, follow); break;
      case RegexNode::repeat: repeat(node, follow); break;
      case RegexNode::look:
        if (node.behind) {
          add(RegexStep::look_back, set(node.parts[0].characters), 0, node.negated);
          break;
        }
        [[fallthrough]];
      case RegexNode::atomic: {
        const size_t step =
            add(node.kind == RegexNode::look ? RegexStep::look_ahead : RegexStep::atomic, 0, 0, node.negated);
        emit(node.parts[0], CharacterSet());
        add(RegexStep::done);
        regex_.steps_[step].a = here();
      }
    }
  }

  static CharacterSet follow_of(const RegexNode &node, size_t i, const CharacterSet &follow) {
    CharacterSet result;
    for (; i < node.parts.size(); i++) {
      const Beginning begins = beginning_of(node.parts[i]);
      if (begins.asserts) return CharacterSet::all();
      result = result | begins.set;
      if (!begins.empty) return result;
    }
    return result | follow;
  }

  void choice(const RegexNode &node, const CharacterSet &follow) {
    std::vector<size_t> ends;
    for (size_t i = 0; i + 1 < node.parts.size(); i++) {
      const size_t fork = add_fork(node.parts[i]);
      emit(node.parts[i], follow);
      ends.push_back(add(RegexStep::jump));
      regex_.steps_[fork].b = here();
    }
    emit(node.parts.back(), follow);
    for (const size_t end : ends) regex_.steps_[end].a = here();
  }

  // A fork of which the first way is `node`, next.
  size_t add_fork(const RegexNode &node) {
    const Beginning begins = beginning_of(node);
    return add(RegexStep::fork, here() + 1, 0, begins.empty ? RegexStep::none : set(begins.set));
  }

  void repeat(const RegexNode &node, const CharacterSet &follow) {
    const RegexNode &part = node.parts[0];
    if (part.kind == RegexNode::set && node.mode != RegexNode::lazy) {
      const bool all = node.mode == RegexNode::possessive || !part.characters.overlaps(follow);
      add(all ? RegexStep::all : RegexStep::loop, set(part.characters), node.least, node.most);
      return;
    }
    const Beginning begins = beginning_of(part);
    if (begins.empty) throw unsupported_error("a regular expression that repeats what may be empty is not supported");
    const CharacterSet after = begins.asserts ? CharacterSet::all() : begins.set | follow;
    const size_t atomic = node.mode == RegexNode::possessive ? add(RegexStep::atomic) : 0;
    for (uint32_t i = 0; i < node.least; i++) emit(part, after);
    std::vector<size_t> forks;
    if (node.most == RegexNode::unbounded) {
      const size_t begin = here();
      forks.push_back(node.mode == RegexNode::lazy ? add(RegexStep::fork, 0, here() + 1, RegexStep::none)
                                                   : add_fork(part));
      emit(part, after);
      add(RegexStep::jump, static_cast<uint32_t>(begin));
    } else {
      for (uint32_t i = node.least; i < node.most; i++) {
        forks.push_back(node.mode == RegexNode::lazy ? add(RegexStep::fork, 0, here() + 1, RegexStep::none)
                                                     : add_fork(part));
        emit(part, after);
      }
    }
    for (const size_t fork : forks)
      (node.mode == RegexNode::lazy ? regex_.steps_[fork].a : regex_.steps_[fork].b) = here();
    if (node.mode == RegexNode::possessive) {
      add(RegexStep::done);
      regex_.steps_[atomic].a = here();
    }
  }

  uint32_t here() const { return static_cast<uint32_t>(regex_.steps_.size()); }
  uint32_t set(CharacterSet characters) {
    characters.finish();
    regex_.sets_.push_back(std::move(characters));
    return static_cast<uint32_t>(regex_.sets_.size() - 1);
  }
  size_t add(RegexStep::Op op, uint32_t a = 0, uint32_t b = 0, uint32_t c = 0) {
    if (regex_.steps_.size() >= most_program_steps) throw unsupported_error("a regular expression is too long");
    regex_.steps_.push_back({op, a, b, c});
    return regex_.steps_.size() - 1;
  }

  Regex &regex_;
};

Regex::Regex(std::string_view pattern) { RegexEmitter(*this).program(parse_regex(pattern)); }

Regex Regex::literal(std::string_view text) {
  RegexNode node;
  node.kind = RegexNode::sequence;
  for (size_t at = 0; at < text.size();) {
    RegexNode part;
    part.kind = RegexNode::set;
    const char32_t c = next_character(text, at);
    part.characters = CharacterSet::range(c, c);
    node.parts.push_back(std::move(part));
  }
  Regex regex;
  RegexEmitter(regex).program(node);
  return regex;
}

}  // namespace mnemos
