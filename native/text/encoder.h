// A whole tokenizer's way from text to ids.
#pragma once

#include <bitset>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "text/cut.h"
#include "text/model.h"
#include "text/normalize.h"
#include "text/trie.h"

namespace mnemos {

// A token that is found in the text before it is cut into words.
struct AddedToken {
  std::string text;
  int32_t id = 0;
  bool single_word = false;  // only between characters of no word
  bool left = false, right = false;  // with the white space beside it
  bool normalized = false;  // found in normalized text, itself normalized
  bool ignored = false;  // its text stays text, but nothing else is found in it
};

class AddedTokens {
 public:
  AddedTokens() = default;
  // Throws Error (unsupported) if a token's normalized text is empty.
  AddedTokens(std::vector<AddedToken> tokens, const std::vector<NormalizerPointer> &normalizers);

  struct Part {
    size_t begin, end;
    int32_t id;  // -1: text
  };
  // Cuts a text that is not empty into tokens and what is between them: the leftmost tokens, the longest of them.
  void find(std::string_view text, bool normalized, std::vector<Part> &parts) const;
  bool any(bool normalized) const { return matchers_[normalized].first.any(); }

 private:
  struct Matcher {
    Trie trie;  // indices of tokens
    std::bitset<256> first;
  };
  std::vector<AddedToken> tokens_;
  Matcher matchers_[2];  // [normalized]
};

// A text as normalizers leave it: `text` itself if there are none, else in `result`.
std::string_view normalize(const std::vector<NormalizerPointer> &normalizers, std::string_view text,
                           std::string &result, std::string &spare);

class Encoder {
 public:
  explicit Encoder(std::shared_ptr<const TextModel> model) : model_(std::move(model)) {}
  Encoder(const Encoder &) = delete;
  Encoder &operator=(const Encoder &) = delete;

  // To be called before the first `encode`, normalizers before added tokens.
  void add_normalizer(NormalizerPointer step) { normalizers_.push_back(std::move(step)); }
  void add_cutter(CutterPointer step) { cutters_.push_back(std::move(step)); }
  void set_added(std::vector<AddedToken> tokens, std::vector<AddedToken> plain);
  void surround(Ids before, Ids after) { before_ = std::move(before), after_ = std::move(after); }

  // The ids of UTF-8 text. add_special: with what surrounds it; parse_special: false for the `plain` added tokens.
  // Throws Error (request).
  Ids encode(std::string_view text, bool add_special, bool parse_special) const;
  const TextModel &model() const { return *model_; }

 private:
  struct Call;
  void encode_part(std::string_view text, bool first, const AddedTokens &added, Call &call) const;
  void encode_words(std::string_view text, bool first, Call &call) const;
  void encode_word(std::string_view word, Call &call) const;

  std::shared_ptr<const TextModel> model_;
  std::vector<NormalizerPointer> normalizers_;
  std::vector<CutterPointer> cutters_;
  AddedTokens added_, plain_;
  Ids before_, after_;
};

}  // namespace mnemos
