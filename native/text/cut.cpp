#include "text/cut.h"

#include <algorithm>

#include "system/error.h"
#include "text/normalize.h"
#include "text/regex.h"
#include "text/unicode.h"

namespace mnemos {
namespace {

struct Part {
  size_t begin, end;
  bool match;
};

// Matches and what is between them become words, as `use` says.
void use_matches(std::vector<Part> &parts, MatchUse use) {
  std::vector<Part> kept;
  bool was_match = false;
  if (use == MatchUse::with_next) std::reverse(parts.begin(), parts.end());
  for (const Part &part : parts) {
    const bool joins = use == MatchUse::contiguous ? part.match == was_match : part.match && !was_match;
    if (use == MatchUse::removed) {
      if (!part.match) kept.push_back(part);
    } else if (use != MatchUse::isolated && joins && !kept.empty()) {
      kept.back().begin = std::min(kept.back().begin, part.begin);
      kept.back().end = std::max(kept.back().end, part.end);
    } else {
      kept.push_back(part);
    }
    was_match = part.match;
  }
  if (use == MatchUse::with_next) std::reverse(kept.begin(), kept.end());
  parts.swap(kept);
}

// find(text, from, begin, end): the first match at or after `from`, not empty.
template <typename Find>
class MatchCutter : public Cutter {
 public:
  MatchCutter(Find find, MatchUse use, bool inverted) : find_(std::move(find)), use_(use), inverted_(inverted) {}

  void apply(Words &words, Words &spare) const override {
    spare.words.clear();
    std::vector<Part> parts;
    for (const Words::Word &word : words.words) {
      const std::string_view text = words[word];
      const auto keep = [&](size_t begin, size_t end) {
        spare.words.push_back({static_cast<uint32_t>(word.begin + begin), static_cast<uint32_t>(word.begin + end),
                               word.first && begin == 0});
      };
      const bool simple = use_ == MatchUse::isolated || use_ == MatchUse::removed;
      parts.clear();
      const auto add = [&](size_t begin, size_t end, bool match) {
        if (begin == end) return;
        if (!simple)
          parts.push_back({begin, end, match});
        else if (use_ == MatchUse::isolated || !match)
          keep(begin, end);
      };
      size_t at = 0;
      for (size_t begin, end; at < text.size() && find_(text, at, begin, end); at = end) {
        add(at, begin, inverted_);
        add(begin, end, !inverted_);
      }
      add(at, text.size(), inverted_);
      if (simple) continue;
      use_matches(parts, use_);
      for (const Part &part : parts) keep(part.begin, part.end);
    }
    words.words.swap(spare.words);
  }

 private:
  Find find_;
  MatchUse use_;
  bool inverted_;
};

template <typename Find>
CutterPointer make_cutter(Find find, MatchUse use, bool inverted = false) {
  return std::make_unique<MatchCutter<Find>>(std::move(find), use, inverted);
}

bool find_run(std::string_view text, size_t from, size_t &begin, size_t &end) {
  const auto kind = [](char32_t c) { return character_flags()[c] & (word_flag | space_flag); };
  for (size_t at = from; at < text.size();) {
    begin = at;
    const int first = kind(next_character(text, at));
    if (first == space_flag) continue;
    for (end = at; at < text.size() && kind(next_character(text, at)) == first;) end = at;
    return true;
  }
  return false;
}

class ByteCutter : public Cutter {
 public:
  ByteCutter(bool adds_space, bool splits) : adds_space_(adds_space) {
    if (splits)
      cutter_ = make_regex_cutter(R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)",
                                  false, MatchUse::isolated, false);
  }

  void apply(Words &words, Words &spare) const override {
    if (adds_space_) {
      rewrite(words, spare, [&](std::string_view word, bool, std::string &result) {
        if (word.front() != ' ') result += ' ';
        result += word;
      });
    }
    if (cutter_) cutter_->apply(words, spare);
    rewrite(words, spare,
            [](std::string_view word, bool, std::string &result) { append_byte_characters(result, word); });
  }

  template <typename Change>
  static void rewrite(Words &words, Words &spare, const Change &change) {
    spare.text.clear();
    spare.text.reserve(words.text.size() + words.text.size() / 4);
    for (Words::Word &word : words.words) {
      const size_t begin = spare.text.size();
      change(words[word], word.first, spare.text);
      if (spare.text.size() > UINT32_MAX) throw capacity_error("a text of more than 4 GiB cannot be encoded");
      word.begin = static_cast<uint32_t>(begin), word.end = static_cast<uint32_t>(spare.text.size());
    }
    words.text.swap(spare.text);
  }

 private:
  bool adds_space_;
  CutterPointer cutter_;
};

class MarkCutter : public Cutter {
 public:
  MarkCutter(std::string mark, SpaceUse use, bool splits) : mark_(std::move(mark)), use_(use) {
    if (splits) cutter_ = make_regex_cutter(mark_, true, MatchUse::with_next, false);
    replace_ = make_replace(" ", true, mark_);
  }

  void apply(Words &words, Words &spare) const override {
    ByteCutter::rewrite(words, spare, [&](std::string_view word, bool first, std::string &result) {
      const bool marked = word.front() == ' ' || word.substr(0, mark_.size()) == mark_;
      if (!marked && (use_ == SpaceUse::always || (use_ == SpaceUse::first && first))) result += mark_;
      replace_->apply(word, result);
    });
    if (cutter_) cutter_->apply(words, spare);
  }

 private:
  std::string mark_;
  SpaceUse use_;
  NormalizerPointer replace_;
  CutterPointer cutter_;
};

}  // namespace

CutterPointer make_regex_cutter(std::string_view pattern, bool literal, MatchUse use, bool inverted) {
  const auto find = [regex = literal ? Regex::literal(pattern) : Regex(pattern)](std::string_view text, size_t from,
                                                                                 size_t &begin, size_t &end) {
    return regex.find(text, from, begin, end);
  };
  return make_cutter(find, use, inverted);
}

CutterPointer make_character_cutter(uint8_t flags, MatchUse use) {
  const auto find = [flags](std::string_view text, size_t from, size_t &begin, size_t &end) {
    for (end = from; end < text.size();) {
      begin = end;
      if (character_flags()[next_character(text, end)] & flags) return true;
    }
    return false;
  };
  return make_cutter(find, use);
}

CutterPointer make_word_cutter() { return make_cutter(find_run, MatchUse::removed, true); }

CutterPointer make_byte_cutter(bool adds_space, bool splits) {
  return std::make_unique<ByteCutter>(adds_space, splits);
}

CutterPointer make_mark_cutter(std::string mark, SpaceUse use, bool splits) {
  return std::make_unique<MarkCutter>(std::move(mark), use, splits);
}

}  // namespace mnemos
