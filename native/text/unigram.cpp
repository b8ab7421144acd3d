#include <algorithm>
#include <array>

#include "system/error.h"
#include "text/model.h"
#include "text/trie.h"
#include "text/unicode.h"

namespace mnemos {
namespace {

constexpr double unknown_penalty = 10;  // SentencePiece's, below the least probable piece

class Unigram : public TextModel {
 public:
  Unigram(std::shared_ptr<const Pieces> pieces, std::vector<double> scores, const std::vector<int32_t> &hidden,
          int32_t unknown, bool byte_fallback)
      : TextModel(std::move(pieces)), scores_(std::move(scores)), found_(scores_.size(), true), unknown_(unknown) {
    for (const int32_t id : hidden)
      if (size_t(id) < found_.size()) found_[size_t(id)] = false;
    double least = 0;
    for (size_t i = 0; i < scores_.size(); i++) {
      least = i == 0 ? scores_[i] : std::min(least, scores_[i]);
      if (found_[i] && !pieces_->text(i).empty()) trie_.add_new(pieces_->text(i), static_cast<int32_t>(i));
    }
    unknown_score_ = least - unknown_penalty;
    bytes_.fill(-1);
    for (int byte = 0; byte_fallback && byte < 256; byte++) {
      constexpr char digits[] = "0123456789ABCDEF";
      const char name[] = {'<', '0', 'x', digits[byte >> 4], digits[byte & 15], '>'};
      bytes_[byte] = find({name, sizeof name});
    }
  }

  void encode(std::string_view word, Ids &ids, Scratch &scratch) const override {
    auto &steps = scratch.steps;
    steps.assign(word.size() + 1, {0, -1, -1});
    for (size_t begin = 0; begin < word.size();) {
      size_t following = begin;
      next_character(word, following);
      const double score = steps[begin].score;
      bool single = false;
      const auto offer = [&](size_t end, double total, int32_t id) {
        Scratch::Step &step = steps[end];
        if (step.begin < 0 || total > step.score) step = {total, static_cast<int64_t>(begin), id};
      };
      uint32_t node = 0;
      for (size_t end = begin; end < word.size();) {
        node = trie_.child(node, static_cast<uint8_t>(word[end++]));
        if (node == Trie::nothing) break;
        const int32_t id = trie_.value(node);
        if (id < 0) continue;
        offer(end, scores_[size_t(id)] + score, id);
        single = single || end == following;
      }
      if (!single) {
        if (unknown_ < 0) throw request_error("a character is in no piece, and there is no unknown token");
        offer(following, unknown_score_ + score, unknown_);
      }
      begin = following;
    }
    const size_t first = ids.size();
    for (size_t end = word.size(); end > 0;) {  // from the right
      size_t begin = size_t(steps[end].begin);
      // Unknown neighbours are one.
      if (steps[end].id == unknown_)
        while (begin > 0 && steps[begin].id == unknown_) begin = size_t(steps[begin].begin);
      append(word.substr(begin, end - begin), ids);
      end = begin;
    }
    std::reverse(ids.begin() + static_cast<ptrdiff_t>(first), ids.end());
  }

 private:
  int32_t find(std::string_view text) const {
    const int32_t id = pieces_->find(text);
    return size_t(id) < found_.size() && found_[size_t(id)] ? id : -1;
  }

  // The ids of a piece, or of unknown text, last one first.
  void append(std::string_view text, Ids &ids) const {
    const int32_t id = find(text);
    if (id >= 0) {
      ids.push_back(id);
    } else if (std::all_of(text.begin(), text.end(),
                           [&](char byte) { return bytes_[static_cast<uint8_t>(byte)] >= 0; })) {
      std::for_each(text.rbegin(), text.rend(), [&](char byte) { ids.push_back(bytes_[static_cast<uint8_t>(byte)]); });
    } else {
      if (unknown_ < 0) throw request_error("a character is in no piece, and there is no unknown token");
      ids.push_back(unknown_);
    }
  }

  Trie trie_;
  std::vector<double> scores_;
  std::vector<bool> found_;
  int32_t unknown_;
  double unknown_score_ = 0;
  std::array<int32_t, 256> bytes_;
};

}  // namespace

std::unique_ptr<TextModel> make_unigram(std::shared_ptr<const Pieces> pieces, std::vector<double> scores,
                                        const std::vector<int32_t> &hidden, int32_t unknown, bool byte_fallback) {
  if (scores.size() > pieces->size())
    throw format_error("the vocabulary has " + std::to_string(pieces->size()) + " tokens, but " +
                       std::to_string(scores.size()) + " scores");
  return std::make_unique<Unigram>(std::move(pieces), std::move(scores), hidden, unknown, byte_fallback);
}

}  // namespace mnemos
