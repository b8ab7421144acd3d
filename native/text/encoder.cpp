#include "text/encoder.h"

#include <algorithm>

#include "system/error.h"
#include "text/regex.h"
#include "text/unicode.h"

namespace mnemos {
namespace {

constexpr size_t longest_kept = 64;  // bytes of a word

bool is_word_character(char32_t c) { return character_flags()[c] & word_flag; }

// The words of one call and their ids, which are in the result already.
class KnownWords {
 public:
  struct Entry {
    uint64_t hash = 0;
    uint32_t text_begin = 0, text_size = 0, ids_begin = 0, ids_size = 0;
  };

  explicit KnownWords(size_t text_size) {
    size_t entries = 0;
    for (size_t size = 16; 8 * size <= text_size && size <= 1 << 14; size *= 2) entries = size;
    entries_.resize(entries);
  }
  bool used() const { return !entries_.empty(); }
  Entry &at(uint64_t hash) { return entries_[hash & (entries_.size() - 1)]; }
  bool holds(const Entry &entry, uint64_t hash, std::string_view word) const {
    return entry.hash == hash && std::string_view(texts_).substr(entry.text_begin, entry.text_size) == word;
  }
  void set(Entry &entry, uint64_t hash, std::string_view word, size_t ids_begin, size_t ids_size) {
    if (texts_.size() > most_bytes) return;
    entry = {hash, static_cast<uint32_t>(texts_.size()), static_cast<uint32_t>(word.size()),
             static_cast<uint32_t>(ids_begin), static_cast<uint32_t>(ids_size)};
    texts_ += word;
  }

 private:
  static constexpr size_t most_bytes = 16 << 20;
  std::vector<Entry> entries_;
  std::string texts_;
};

}  // namespace

AddedTokens::AddedTokens(std::vector<AddedToken> tokens, const std::vector<NormalizerPointer> &normalizers)
    : tokens_(std::move(tokens)) {
  std::string result, spare;
  for (size_t i = 0; i < tokens_.size(); i++) {
    const AddedToken &token = tokens_[i];
    const std::string_view text = token.normalized ? normalize(normalizers, token.text, result, spare) : token.text;
    if (text.empty()) throw unsupported_error("an added token of which nothing is left is not supported");
    Matcher &matcher = matchers_[token.normalized];
    matcher.trie.add_new(text, static_cast<int32_t>(i));  // of two with the same text, the first one counts
    matcher.first.set(static_cast<uint8_t>(text[0]));
  }
}

void AddedTokens::find(std::string_view text, bool normalized, std::vector<Part> &parts) const {
  const Matcher &matcher = matchers_[normalized];
  size_t done = 0;
  for (size_t at = 0; at < text.size();) {
    if (!matcher.first[static_cast<uint8_t>(text[at])]) {
      at++;
      continue;
    }
    int32_t found = -1;
    size_t found_end = at;
    uint32_t node = 0;
    for (size_t end = at; end < text.size();) {
      node = matcher.trie.child(node, static_cast<uint8_t>(text[end++]));
      if (node == Trie::nothing) break;
      if (matcher.trie.value(node) >= 0) found = matcher.trie.value(node), found_end = end;
    }
    if (found < 0) {
      at++;
      continue;
    }
    size_t begin = at, end = found_end;
    at = found_end;
    const AddedToken &token = tokens_[static_cast<size_t>(found)];
    if (token.ignored) continue;
    size_t before = begin, after = end;
    if (token.single_word && ((begin > 0 && is_word_character(previous_character(text, before))) ||
                              (end < text.size() && is_word_character(next_character(text, after)))))
      continue;
    if (token.left)
      for (size_t to = begin; to > done && is_space(previous_character(text, to));) begin = to;
    if (token.right)
      for (size_t to = end; to < text.size() && is_space(next_character(text, to));) end = to;
    if (done < begin) parts.push_back({done, begin, -1});
    parts.push_back({begin, end, token.id});
    done = end;
  }
  if (done < text.size()) parts.push_back({done, text.size(), -1});
}

std::string_view normalize(const std::vector<NormalizerPointer> &normalizers, std::string_view text,
                           std::string &result, std::string &spare) {
  for (const NormalizerPointer &step : normalizers) {
    spare.clear();
    spare.reserve(text.size() + text.size() / 4);
    step->apply(text, spare);
    result.swap(spare);
    text = result;
  }
  return text;
}

struct Encoder::Call {
  explicit Call(size_t text_size) : known(text_size) {}
  Ids ids;
  Scratch scratch;
  KnownWords known;
  std::string normalized, spare;
  std::vector<AddedTokens::Part> parts;
  Words words, spare_words;
};

void Encoder::set_added(std::vector<AddedToken> tokens, std::vector<AddedToken> plain) {
  added_ = AddedTokens(std::move(tokens), normalizers_);
  plain_ = AddedTokens(std::move(plain), normalizers_);
}

Ids Encoder::encode(std::string_view text, bool add_special, bool parse_special) const {
  if (text.size() > UINT32_MAX / 4) throw request_error("a text of more than 1 GiB cannot be encoded");
  Call call(text.size());
  call.ids.reserve(text.size() / 4 + 8);
  const AddedTokens &added = parse_special ? added_ : plain_;
  if (add_special) call.ids = before_;
  try {
    if (added.any(false)) {
      std::vector<AddedTokens::Part> parts;
      added.find(text, false, parts);
      for (const AddedTokens::Part &part : parts) {
        if (part.id >= 0)
          call.ids.push_back(part.id);
        else
          encode_part(text.substr(part.begin, part.end - part.begin), part.begin == 0, added, call);
      }
    } else if (!text.empty()) {
      encode_part(text, true, added, call);
    }
  } catch (const TooManySteps &) {
    throw request_error("a regular expression of the pre-tokenizer takes too many steps on this text");
  }
  if (add_special) call.ids.insert(call.ids.end(), after_.begin(), after_.end());
  return std::move(call.ids);
}

void Encoder::encode_part(std::string_view text, bool first, const AddedTokens &added, Call &call) const {
  text = normalize(normalizers_, text, call.normalized, call.spare);
  if (text.empty()) return;
  if (!added.any(true)) return encode_words(text, first, call);
  call.parts.clear();
  added.find(text, true, call.parts);
  for (const AddedTokens::Part &part : call.parts) {
    if (part.id >= 0)
      call.ids.push_back(part.id);
    else
      encode_words(text.substr(part.begin, part.end - part.begin), first && part.begin == 0, call);
  }
}

void Encoder::encode_words(std::string_view text, bool first, Call &call) const {
  if (cutters_.empty()) return encode_word(text, call);
  call.words.text.assign(text);
  call.words.words.assign(1, {0, static_cast<uint32_t>(text.size()), first});
  for (const CutterPointer &cutter : cutters_) cutter->apply(call.words, call.spare_words);
  for (const Words::Word &word : call.words.words) encode_word(call.words[word], call);
}

void Encoder::encode_word(std::string_view word, Call &call) const {
  for (size_t begin = 0; begin < word.size();) {
    const size_t end = model_->cut(word, begin);
    const std::string_view part = word.substr(begin, end - begin);
    begin = end;
    if (part.size() > longest_kept || !call.known.used()) {
      model_->encode(part, call.ids, call.scratch);
      continue;
    }
    const uint64_t hash = Pieces::hash_of(part);
    KnownWords::Entry &entry = call.known.at(hash);
    const size_t ids_begin = call.ids.size();
    if (call.known.holds(entry, hash, part)) {
      call.ids.resize(ids_begin + entry.ids_size);
      std::copy_n(call.ids.begin() + entry.ids_begin, entry.ids_size,
                  call.ids.begin() + static_cast<ptrdiff_t>(ids_begin));
    } else {
      model_->encode(part, call.ids, call.scratch);
      call.known.set(entry, hash, part, ids_begin, call.ids.size() - ids_begin);
    }
  }
}

}  // namespace mnemos
