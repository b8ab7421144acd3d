#include "text/normalize.h"

#include <array>
#include <cstring>
#include <vector>

#include "system/error.h"
#include "text/regex.h"
#include "text/unicode.h"

namespace mnemos {
namespace {

template <typename Drop>
void append_without(std::string &result, std::string_view text, const Drop &drop) {
  for (size_t at = 0; at < text.size();) {
    const size_t begin = at;
    if (!drop(next_character(text, at))) result += text.substr(begin, at - begin);
  }
}

class Simple : public Normalizer {
 public:
  explicit Simple(SimpleNormalizer kind) : kind_(kind) {}

  void apply(std::string_view text, std::string &result) const override {
    switch (kind_) {
      case SimpleNormalizer::NFC: return append_normal_form(result, text, NormalForm::NFC);
      case SimpleNormalizer::NFD: return append_normal_form(result, text, NormalForm::NFD);
      case SimpleNormalizer::NFKC: return append_normal_form(result, text, NormalForm::NFKC);
      case SimpleNormalizer::NFKD: return append_normal_form(result, text, NormalForm::NFKD);
      case SimpleNormalizer::lowercase: return append_lower(result, text);
      case SimpleNormalizer::strip_accents:
        return append_without(result, text, [](char32_t c) { return character_flags()[c] & mark_flag; });
      case SimpleNormalizer::byte_level: return append_byte_characters(result, text);
      case SimpleNormalizer::strip_left: {
        size_t begin = 0;
        for (size_t at = 0; at < text.size() && is_space(next_character(text, at));) begin = at;
        result += text.substr(begin);
        return;
      }
      case SimpleNormalizer::strip_right: {
        size_t end = text.size();
        for (size_t at = end; at > 0 && is_space(previous_character(text, at));) end = at;
        result += text.substr(0, end);
      }
    }
  }

 private:
  SimpleNormalizer kind_;
};

// Devlin et al. 2018, arXiv:1810.04805: the cleaning of BERT's own tokenizer.
class Bert : public Normalizer {
 public:
  explicit Bert(const BertOptions &options) : options_(options) {}

  void apply(std::string_view text, std::string &result) const override {
    std::string now(text), next;
    const auto step = [&](bool wanted, const auto &change) {
      if (!wanted) return;
      next.clear();
      change();
      now.swap(next);
    };
    step(options_.clean, [&] { clean(now, next); });
    step(options_.space_chinese, [&] { space_chinese(now, next); });
    step(options_.strip_accents, [&] {
      std::string apart;
      append_normal_form(apart, now, NormalForm::NFD);
      append_without(next, apart, [](char32_t c) { return character_flags()[c] & nonspacing_flag; });
    });
    step(options_.lowercase, [&] { append_lower(next, now); });
    result += now;
  }

 private:
  static void clean(std::string_view text, std::string &result) {
    for (size_t at = 0; at < text.size();) {
      const char32_t c = next_character(text, at);
      const uint8_t flags = character_flags()[c];
      if (c == '\t' || c == '\n' || c == '\r')
        result += ' ';
      else if (!(flags & control_flag))
        append_character(result, flags & space_flag ? ' ' : c);
    }
  }
  static void space_chinese(std::string_view text, std::string &result) {
    for (size_t at = 0; at < text.size();) {
      const char32_t c = next_character(text, at);
      const bool chinese = is_chinese(c);
      if (chinese) result += ' ';
      append_character(result, c);
      if (chinese) result += ' ';
    }
  }
  static bool is_chinese(char32_t c) {
    constexpr std::array<std::array<char32_t, 2>, 8> blocks = {{{0x4E00, 0x9FFF},
                                                                {0x3400, 0x4DBF},
                                                                {0x20000, 0x2A6DF},
                                                                {0x2A700, 0x2B73F},
                                                                {0x2B740, 0x2B81F},
                                                                {0x2B920, 0x2CEAF},
                                                                {0xF900, 0xFAFF},
                                                                {0x2F800, 0x2FA1F}}};
    for (const auto &block : blocks)
      if (c >= block[0] && c <= block[1]) return true;
    return false;
  }

  BertOptions options_;
};

class Prepend : public Normalizer {
 public:
  explicit Prepend(std::string text) : text_(std::move(text)) {}
  void apply(std::string_view text, std::string &result) const override {
    if (!text.empty()) result.append(text_).append(text);
  }

 private:
  std::string text_;
};

class ReplaceText : public Normalizer {
 public:
  ReplaceText(std::string_view pattern, std::string content) : pattern_(pattern), content_(std::move(content)) {}
  void apply(std::string_view text, std::string &result) const override {
    for (size_t at = 0;;) {
      const size_t found = text.find(pattern_, at);
      result += text.substr(at, found - at);
      if (found == std::string_view::npos) return;
      result += content_;
      at = found + pattern_.size();
    }
  }

 private:
  std::string pattern_, content_;
};

class ReplaceMatches : public Normalizer {
 public:
  ReplaceMatches(std::string_view pattern, std::string content) : regex_(pattern), content_(std::move(content)) {}
  void apply(std::string_view text, std::string &result) const override {
    size_t at = 0;
    for (size_t begin, end; regex_.find(text, at, begin, end); at = end) {
      result += text.substr(at, begin - at);
      result += content_;
    }
    result += text.substr(at);
  }

 private:
  Regex regex_;
  std::string content_;
};

// A double array (Aoe 1989, as in the library Darts-clone) and the texts that its values are places in.
class CharacterMap : public Normalizer {
 public:
  explicit CharacterMap(std::string_view table) {
    uint32_t size = 0;
    if (table.size() >= sizeof size) std::memcpy(&size, table.data(), sizeof size);
    if (table.size() < sizeof size || size > table.size() - sizeof size || size % sizeof(uint32_t) != 0 || size == 0)
      throw format_error("the table of characters has a size of " + std::to_string(size) + " in " +
                         std::to_string(table.size()) + " bytes");
    units_.resize(size / sizeof(uint32_t));
    std::memcpy(units_.data(), table.data() + sizeof size, size);
    texts_ = table.substr(sizeof size + size);
    if (!is_utf8(texts_)) throw format_error("the texts of the table of characters are not UTF-8");
  }

  void apply(std::string_view text, std::string &result) const override {
    // Where a cluster of few bytes begins as an entry does, it becomes that; otherwise each character is looked up.
    constexpr size_t few = 6;
    for (size_t at = 0; at < text.size();) {
      const size_t end = grapheme_end(text, at);
      std::string_view found;
      if (end - at < few && look_up(text.substr(at, end - at), found)) {
        result += found;
        at = end;
        continue;
      }
      while (at < end) {
        const size_t begin = at;
        next_character(text, at);
        const std::string_view character = text.substr(begin, at - begin);
        result += look_up(character, found) ? found : character;
      }
    }
  }

 private:
  bool look_up(std::string_view key, std::string_view &found) const {
    const auto offset = [](uint32_t unit) { return (unit >> 10) << ((unit & 1 << 9) >> 6); };
    size_t node = offset(units_[0]);
    for (const char byte : key) {
      const uint8_t label = static_cast<uint8_t>(byte);
      node ^= label;
      if (label == 0 || node >= units_.size()) return false;
      const uint32_t unit = units_[node];
      if ((unit & (1u << 31 | 0xFF)) != label) return false;
      node ^= offset(unit);
      if (node >= units_.size()) return false;
      if (unit >> 8 & 1) {
        const size_t begin = units_[node] & ~(1u << 31);
        if (begin >= texts_.size() || (static_cast<uint8_t>(texts_[begin]) & 0xC0) == 0x80) return false;
        const size_t end = std::min(texts_.find('\0', begin), texts_.size());
        found = std::string_view(texts_).substr(begin, end - begin);
        return true;
      }
    }
    return false;
  }

  std::vector<uint32_t> units_;
  std::string texts_;
};

}  // namespace

NormalizerPointer make_simple_normalizer(SimpleNormalizer kind) { return std::make_unique<Simple>(kind); }
NormalizerPointer make_bert_normalizer(const BertOptions &options) { return std::make_unique<Bert>(options); }
NormalizerPointer make_prepend(std::string text) { return std::make_unique<Prepend>(std::move(text)); }

NormalizerPointer make_replace(std::string_view pattern, bool literal, std::string content) {
  if (!literal) return std::make_unique<ReplaceMatches>(pattern, std::move(content));
  if (pattern.empty()) throw unsupported_error("a replacement of empty text is not supported");
  return std::make_unique<ReplaceText>(pattern, std::move(content));
}

NormalizerPointer make_character_map(std::string_view table) { return std::make_unique<CharacterMap>(table); }

void append_byte_characters(std::string &result, std::string_view text) {
  static const std::array<std::array<char, 3>, 256> spelled = [] {
    std::array<std::array<char, 3>, 256> table{};  // the size, then up to two bytes
    char32_t following = 0x100;
    for (uint32_t byte = 0; byte < 256; byte++) {
      const bool printable = (byte > 0x20 && byte < 0x7F) || (byte > 0xA0 && byte != 0xAD);
      std::string character;
      append_character(character, printable ? byte : following++);
      table[byte][0] = static_cast<char>(character.size());
      std::copy(character.begin(), character.end(), table[byte].begin() + 1);
    }
    return table;
  }();
  for (const char byte : text) {
    const auto &character = spelled[static_cast<uint8_t>(byte)];
    result.push_back(character[1]);
    if (character[0] == 2) result.push_back(character[2]);
  }
}

}  // namespace mnemos
