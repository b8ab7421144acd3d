// How a text is cut into words: pre-tokenizers.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace mnemos {

// A text and the words in it, one after another; what is between them is left out.
struct Words {
  struct Word {
    uint32_t begin, end;
    bool first;  // it begins where the whole text did
  };
  std::string text;
  std::vector<Word> words;

  std::string_view operator[](const Word &word) const {
    return std::string_view(text).substr(word.begin, word.end - word.begin);
  }
};

class Cutter {
 public:
  virtual ~Cutter() = default;
  // `spare` is memory whose content does not matter.
  virtual void apply(Words &words, Words &spare) const = 0;
};
using CutterPointer = std::unique_ptr<const Cutter>;

// What becomes of a match: a word of its own, nothing, part of a word of matches, of the word before or after it.
enum class MatchUse { isolated, removed, contiguous, with_previous, with_next };

// Throws Error (unsupported) for a regular expression that is not known. inverted: what lies between matches counts.
CutterPointer make_regex_cutter(std::string_view pattern, bool literal, MatchUse use, bool inverted);
CutterPointer make_character_cutter(uint8_t flags, MatchUse use);  // CharacterFlag
CutterPointer make_word_cutter();  // runs of letters, digits and _, and of everything else but spaces
// Bytes as GPT-2's alphabet; adds_space: each word begins with a space.
CutterPointer make_byte_cutter(bool adds_space, bool splits);
enum class SpaceUse { always, first, never };
// SentencePiece's: spaces are `mark`, which stands before words.
CutterPointer make_mark_cutter(std::string mark, SpaceUse use, bool splits);

}  // namespace mnemos
