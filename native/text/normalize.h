// What is done to a text before it is cut into words.
#pragma once

#include <memory>
#include <string>
#include <string_view>

namespace mnemos {

class Normalizer {
 public:
  virtual ~Normalizer() = default;
  // Appends the normalized text.
  virtual void apply(std::string_view text, std::string &result) const = 0;
};
using NormalizerPointer = std::unique_ptr<const Normalizer>;

enum class SimpleNormalizer { NFC, NFD, NFKC, NFKD, lowercase, strip_accents, strip_left, strip_right, byte_level };

struct BertOptions {
  bool clean = true, space_chinese = true, strip_accents = true, lowercase = true;
};

NormalizerPointer make_simple_normalizer(SimpleNormalizer kind);
NormalizerPointer make_bert_normalizer(const BertOptions &options);
NormalizerPointer make_prepend(std::string text);
// Throws Error (unsupported) for a regular expression that is not known.
NormalizerPointer make_replace(std::string_view pattern, bool literal, std::string content);
// SentencePiece's table of characters, `precompiled_charsmap`. Throws Error (format) if it is damaged.
NormalizerPointer make_character_map(std::string_view table);

// GPT-2's alphabet: each byte as a printable character.
void append_byte_characters(std::string &result, std::string_view text);

}  // namespace mnemos
