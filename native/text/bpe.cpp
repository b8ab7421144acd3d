#include <algorithm>
#include <array>
#include <atomic>
#include <functional>
#include <mutex>

#include "system/error.h"
#include "text/model.h"
#include "text/unicode.h"

namespace mnemos {
namespace {

constexpr uint64_t no_rank = ~uint64_t(0);
constexpr size_t few_symbols = 48;  // up to here, looking at all pairs again is faster than a heap
constexpr std::string_view space = "\u2581";  // SentencePiece's
constexpr char32_t space_character = 0x2581;

struct Merge {
  uint64_t rank = no_rank;
  int32_t id = -1;
};

// Pairs of ids as a file lists them.
class ListedPairs {
 public:
  void reserve(size_t count) {
    size_t slots = 16;
    while (slots < 2 * count) slots *= 2;
    slots_.assign(slots, Slot{no_rank, 0, -1});
  }
  void set(int32_t left, int32_t right, uint32_t rank, int32_t id) {
    Slot &slot = slots_[place(key(left, right))];
    slot = {key(left, right), rank, id};  // of two equal merges, the later one counts
  }
  Merge find(int32_t left, int32_t right) const {
    const Slot &slot = slots_[place(key(left, right))];
    return slot.id < 0 ? Merge() : Merge{slot.rank, slot.id};
  }

 private:
  struct Slot {
    uint64_t key;
    uint32_t rank;
    int32_t id;
  };
  static uint64_t key(int32_t left, int32_t right) { return uint64_t(uint32_t(left)) << 32 | uint32_t(right); }
  size_t place(uint64_t key) const {
    const size_t mask = slots_.size() - 1;
    size_t slot = (key * 0x9E3779B97F4A7C15ull >> 29) & mask;
    while (slots_[slot].id >= 0 && slots_[slot].key != key) slot = (slot + 1) & mask;
    return slot;
  }

  std::vector<Slot> slots_;
};

[[noreturn]] void refuse_merge(size_t number, std::string_view token) {
  throw format_error("merge " + std::to_string(number) + " needs the token '" + std::string(token.substr(0, 80)) +
                     "', which is not in the vocabulary");
}

// Merges as a file lists them, by their texts at first: that costs a fifth of looking up all their ids, which is done
// when a text makes it worth while. A merge that does not fit the pieces is then found where a text needs it.
class MergePairs {
 public:
  MergePairs(const Pieces &pieces, const std::vector<std::string_view> &merges, size_t prefix)
      : pieces_(pieces), prefix_(prefix), merges_(merges, Pieces::Twice::last) {
    if (merges.size() <= few_merges || prefix > 0) listed();
  }
  Merge find(int32_t left, int32_t right) const {
    const ListedPairs *table = table_.load(std::memory_order_acquire);
    if (table == nullptr && look_ups_.fetch_add(1, std::memory_order_relaxed) >= most_look_ups) table = listed();
    if (table != nullptr) return table->find(left, right);
    const std::string_view a = pieces_.text(size_t(left)), b = pieces_.text(size_t(right));
    if (a.find(' ', 1) != std::string_view::npos) return {};  // a merge is divided by its first space
    std::string text;
    const int32_t rank = merges_.find(text.append(a).append(1, ' ').append(b));
    if (rank < 0) return {};
    const int32_t id = pieces_.find(text.erase(a.size(), 1));
    if (id < 0) refuse_merge(size_t(rank), text);
    return {uint64_t(rank), id};
  }
  template <typename Each>
  void for_results(const Each &each) const {
    std::string text;
    for (size_t i = 0; i < merges_.size(); i++) {
      text = merges_.text(i);
      each(text.erase(text.find(' ', 1), 1));
    }
  }

 private:
  static constexpr size_t few_merges = 5000;
  static constexpr uint32_t most_look_ups = 20000;

  // The table by ids, made by the first thread that needs it.
  const ListedPairs *listed() const {
    std::call_once(once_, [this] {
      made_.reserve(merges_.size());
      std::string joined;
      for (size_t i = 0; i < merges_.size(); i++) {
        const std::string_view merge = merges_.text(i);
        const size_t divider = merge.find(' ', 1);
        const std::string_view left = merge.substr(0, divider), right = merge.substr(divider + 1);
        const int32_t a = pieces_.find(left), b = pieces_.find(right);
        if (a < 0) refuse_merge(i, left);
        if (b < 0) refuse_merge(i, right);
        const int32_t both = pieces_.find(joined.assign(left).append(right.substr(std::min(right.size(), prefix_))));
        if (both < 0) refuse_merge(i, joined);
        made_.set(a, b, static_cast<uint32_t>(i), both);
      }
      table_.store(&made_, std::memory_order_release);
    });
    return &made_;
  }

  const Pieces &pieces_;
  size_t prefix_;
  Pieces merges_;
  mutable ListedPairs made_;
  mutable std::once_flag once_;
  mutable std::atomic<const ListedPairs *> table_{nullptr};
  mutable std::atomic<uint32_t> look_ups_{0};
};

// Pairs that form a piece together.
class ScoredPairs {
 public:
  ScoredPairs(const Pieces &pieces, std::vector<int32_t> order) : pieces_(pieces), order_(std::move(order)) {
    for (size_t i = 0; i < order_.size(); i++)
      if (order_[i] >= 0) longest_ = std::max(longest_, pieces.text(i).size());
  }
  Merge find(int32_t left, int32_t right) const {
    if (!takes_part(left) || !takes_part(right)) return {};
    const std::string_view a = pieces_.text(size_t(left)), b = pieces_.text(size_t(right));
    if (a.size() + b.size() > longest_) return {};
    char joined[256];
    std::string long_joined;
    std::string_view text;
    if (a.size() + b.size() <= sizeof joined) {
      std::copy(b.begin(), b.end(), std::copy(a.begin(), a.end(), joined));
      text = {joined, a.size() + b.size()};
    } else {
      text = long_joined.append(a).append(b);
    }
    const int32_t id = pieces_.find(text);
    if (id < 0 || !takes_part(id)) return {};
    return {uint64_t(order_[size_t(id)]) << 32 | uint32_t(left), id};
  }
  template <typename Each>
  void for_results(const Each &each) const {
    for (size_t i = 0; i < order_.size(); i++)
      if (order_[i] >= 0) each(pieces_.text(i));
  }

 private:
  bool takes_part(int32_t id) const { return size_t(id) < order_.size() && order_[size_t(id)] >= 0; }

  const Pieces &pieces_;
  std::vector<int32_t> order_;
  size_t longest_ = 0;
};

template <typename Pairs>
class Bpe : public TextModel {
 public:
  template <typename... Arguments>
  Bpe(std::shared_ptr<const Pieces> pieces, BpeOptions options, Arguments &&...of_pairs)
      : TextModel(std::move(pieces)), pairs_(*pieces_, std::forward<Arguments>(of_pairs)...),
        options_(std::move(options)) {
    std::string text;
    for (char32_t c = 0; c < first_ids_.size(); c++) {
      text.clear();
      append_character(text, c);
      first_ids_[c] = pieces_->find(text);
    }
    if (options_.byte_fallback) {
      for (int byte = 0; byte < 256; byte++) {
        constexpr char digits[] = "0123456789ABCDEF";
        const char name[] = {'<', '0', 'x', digits[byte >> 4], digits[byte & 15], '>'};
        bytes_[byte] = pieces_->find({name, sizeof name});
      }
    }
    plain_ = options_.prefix.empty() && options_.suffix.empty();
    cuts_ = plain_ && !options_.ignore_merges && pieces_->find(space) >= 0;
    if (cuts_) pairs_.for_results([&](std::string_view text) { find_glued(text); });
    std::sort(glued_.begin(), glued_.end());
    glued_.erase(std::unique(glued_.begin(), glued_.end()), glued_.end());
  }

  void encode(std::string_view word, Ids &ids, Scratch &scratch) const override {
    if (options_.ignore_merges) {
      const int32_t id = pieces_->find(word);
      if (id >= 0) {
        ids.push_back(id);
        return;
      }
    }
    scratch.symbols.clear();
    split(word, scratch);
    if (scratch.symbols.size() <= few_symbols)
      merge_few(scratch);
    else
      merge_many(scratch);
    ids.insert(ids.end(), scratch.symbols.begin(), scratch.symbols.end());
  }

  // No merge reaches over the beginning of a word that begins with SentencePiece's space.
  size_t cut(std::string_view word, size_t from) const override {
    if (!cuts_) return word.size();
    for (size_t at = from;;) {
      at = word.find(space, at + 1);
      if (at == std::string_view::npos) return word.size();
      size_t before = at;
      const char32_t c = previous_character(word, before);
      if (c != space_character && !std::binary_search(glued_.begin(), glued_.end(), c)) return at;
    }
  }

 private:
  // Characters that stand before a space within a piece.
  void find_glued(std::string_view text) {
    for (size_t at = text.find(space, 1); at != std::string_view::npos; at = text.find(space, at + 1)) {
      size_t before = at;
      const char32_t c = previous_character(text, before);
      if (c != space_character) glued_.push_back(c);
    }
  }

  int32_t id_of(std::string_view word, size_t begin, size_t end, char32_t c, Scratch &scratch) const {
    if (plain_) return c < first_ids_.size() ? first_ids_[c] : pieces_->find(word.substr(begin, end - begin));
    scratch.text.clear();
    if (begin > 0) scratch.text += options_.prefix;
    scratch.text += word.substr(begin, end - begin);
    if (end == word.size()) scratch.text += options_.suffix;
    return pieces_->find(scratch.text);
  }

  // A word's characters as ids.
  void split(std::string_view word, Scratch &scratch) const {
    Ids &symbols = scratch.symbols;
    bool unknown = false;  // one waits: it comes before the next character that is known, and after bytes
    for (size_t at = 0; at < word.size();) {
      const size_t begin = at;
      const char32_t c = next_character(word, at);
      const int32_t id = id_of(word, begin, at, c, scratch);
      if (id >= 0) {
        if (unknown) symbols.push_back(options_.unknown);
        unknown = false;
        symbols.push_back(id);
        continue;
      }
      if (options_.byte_fallback) {
        const std::string_view written = plain_ ? word.substr(begin, at - begin) : std::string_view(scratch.text);
        if (std::all_of(written.begin(), written.end(), [&](char byte) { return bytes_[uint8_t(byte)] >= 0; })) {
          for (const char byte : written) symbols.push_back(bytes_[uint8_t(byte)]);
          continue;
        }
      }
      if (options_.unknown < 0) continue;
      if (unknown && !options_.fuse_unknown) symbols.push_back(options_.unknown);
      unknown = true;
    }
    if (unknown) symbols.push_back(options_.unknown);
  }

  void merge_few(Scratch &scratch) const {
    Ids &symbols = scratch.symbols, &merged = scratch.merged;
    std::vector<uint64_t> &ranks = scratch.ranks;
    if (symbols.size() < 2) return;
    ranks.resize(symbols.size() - 1);
    merged.resize(symbols.size() - 1);
    const auto look_up = [&](size_t i) {
      const Merge merge = pairs_.find(symbols[i], symbols[i + 1]);
      ranks[i] = merge.rank, merged[i] = merge.id;
    };
    for (size_t i = 0; i < ranks.size(); i++) look_up(i);
    while (!ranks.empty()) {
      const auto best = std::min_element(ranks.begin(), ranks.end());
      if (*best == no_rank) return;
      const auto i = best - ranks.begin();
      symbols[size_t(i)] = merged[size_t(i)];
      symbols.erase(symbols.begin() + i + 1);
      ranks.erase(best);
      merged.erase(merged.begin() + i);
      if (i > 0) look_up(size_t(i) - 1);
      if (size_t(i) < ranks.size()) look_up(size_t(i));
    }
  }

  // The same with a heap and a list of neighbours, for words without end.
  void merge_many(Scratch &scratch) const {
    Ids &symbols = scratch.symbols;
    auto &before = scratch.before, &after = scratch.after;
    auto &waiting = scratch.waiting;
    const uint32_t size = static_cast<uint32_t>(symbols.size());
    constexpr uint32_t nothing = ~0u;
    before.resize(size), after.resize(size);
    waiting.clear();
    const auto add = [&](uint32_t at) {
      if (at == nothing || after[at] == nothing) return;
      const Merge merge = pairs_.find(symbols[at], symbols[after[at]]);
      if (merge.rank == no_rank) return;
      waiting.push_back({merge.rank, at, merge.id});
      std::push_heap(waiting.begin(), waiting.end(), std::greater<>());
    };
    for (uint32_t i = 0; i < size; i++) before[i] = i == 0 ? nothing : i - 1, after[i] = i + 1 < size ? i + 1 : nothing;
    for (uint32_t i = 0; i < size; i++) add(i);
    while (!waiting.empty()) {
      std::pop_heap(waiting.begin(), waiting.end(), std::greater<>());
      const Scratch::Waiting now = waiting.back();
      waiting.pop_back();
      // A pair of which one has merged since is no longer there, and what is there instead waits by itself.
      if (symbols[now.at] < 0 || after[now.at] == nothing) continue;
      const Merge merge = pairs_.find(symbols[now.at], symbols[after[now.at]]);
      if (merge.rank != now.rank || merge.id != now.id) continue;
      const uint32_t gone = after[now.at];
      symbols[now.at] = now.id;
      symbols[gone] = -1;
      after[now.at] = after[gone];
      if (after[gone] != nothing) before[after[gone]] = now.at;
      add(before[now.at]);
      add(now.at);
    }
    symbols.erase(std::remove(symbols.begin(), symbols.end(), -1), symbols.end());
  }

  Pairs pairs_;
  BpeOptions options_;
  std::array<int32_t, 0x250> first_ids_;
  std::array<int32_t, 256> bytes_;
  std::vector<char32_t> glued_;
  bool plain_ = true, cuts_ = false;
};

}  // namespace

std::unique_ptr<TextModel> make_bpe(std::shared_ptr<const Pieces> pieces, const std::vector<std::string_view> &merges,
                                    const BpeOptions &options) {
  for (size_t i = 0; i < merges.size(); i++) {
    const size_t divider = merges[i].find(' ', 1);
    if (divider == std::string_view::npos || divider + 1 == merges[i].size())
      throw format_error("holds '" + std::string(merges[i].substr(0, 80)) + "' at " + std::to_string(i) +
                         "; a merge is two tokens with a space between");
  }
  return std::make_unique<Bpe<MergePairs>>(std::move(pieces), options, merges, options.prefix.size());
}

std::unique_ptr<TextModel> make_scored_bpe(std::shared_ptr<const Pieces> pieces, std::vector<int32_t> order,
                                           const BpeOptions &options) {
  if (order.size() != pieces->size())
    throw format_error("the vocabulary has " + std::to_string(pieces->size()) + " tokens, but " +
                       std::to_string(order.size()) + " ranks");
  return std::make_unique<Bpe<ScoredPairs>>(std::move(pieces), options, std::move(order));
}

}  // namespace mnemos
