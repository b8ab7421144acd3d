// How a word becomes tokens: the four kinds of models.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "text/pieces.h"

namespace mnemos {

using Ids = std::vector<int32_t>;

// Memory for what encoding needs on the way, kept from word to word. One thread at a time uses it.
struct Scratch {
  struct Waiting {  // a pair of neighbours that may merge
    uint64_t rank;
    uint32_t at;  // of the left one
    int32_t id;  // of both together

    bool operator>(const Waiting &b) const { return rank != b.rank ? rank > b.rank : at > b.at; }
  };
  struct Step {  // the best way to a place in the text
    double score;
    int64_t begin;  // of its last piece; -1: there is no way yet
    int32_t id;
  };
  Ids symbols, merged;
  std::vector<uint64_t> ranks;
  std::vector<uint32_t> before, after;
  std::vector<Waiting> waiting;
  std::vector<Step> steps;
  std::string text;
};

class TextModel {
 public:
  explicit TextModel(std::shared_ptr<const Pieces> pieces) : pieces_(std::move(pieces)) {}
  virtual ~TextModel() = default;

  const Pieces &pieces() const { return *pieces_; }
  // Appends the ids of a word, which is not empty. Throws Error (request) for one that it cannot encode.
  virtual void encode(std::string_view word, Ids &ids, Scratch &scratch) const = 0;
  // Where a word may be cut, at or after `from`, without changing its ids; its size if nowhere.
  virtual size_t cut(std::string_view word, size_t) const { return word.size(); }

 protected:
  std::shared_ptr<const Pieces> pieces_;
};

// Options of byte-pair encoding; a number of -1 means that there is none.
struct BpeOptions {
  int32_t unknown = -1;  // for characters without a token; without it, they are left out
  bool fuse_unknown = false, byte_fallback = false, ignore_merges = false;
  std::string prefix, suffix;  // of a word's characters after the first, and of its last
};

// Sennrich et al. 2016, arXiv:1508.07909: neighbours are merged, those of the best rank first, the leftmost of them.
// merges: left half, a space, right half, where the left half is not empty and has no other space. Throws Error
// (format) for others, and for a merge that does not fit the vocabulary; in a long list only where a text needs it.
std::unique_ptr<TextModel> make_bpe(std::shared_ptr<const Pieces> pieces, const std::vector<std::string_view> &merges,
                                    const BpeOptions &options);
// SentencePiece's: two neighbours merge where they form a piece; order: each piece's rank, -1 for those that take no
// part. Of two ways to form the same piece, that whose left half has the smaller number goes first.
std::unique_ptr<TextModel> make_scored_bpe(std::shared_ptr<const Pieces> pieces, std::vector<int32_t> order,
                                           const BpeOptions &options);
// Kudo 2018, arXiv:1804.10959: of all ways to cut a word into pieces, the most probable one. The first `scores.size()`
// pieces take part, but for those with `hidden`.
std::unique_ptr<TextModel> make_unigram(std::shared_ptr<const Pieces> pieces, std::vector<double> scores,
                                        const std::vector<int32_t> &hidden, int32_t unknown, bool byte_fallback);
// The longest piece from the left, again and again; the whole word is unknown if there is none.
std::unique_ptr<TextModel> make_word_piece(std::shared_ptr<const Pieces> pieces, int32_t unknown, std::string prefix,
                                           size_t most_characters);
// Words as they are.
std::unique_ptr<TextModel> make_word_level(std::shared_ptr<const Pieces> pieces, int32_t unknown);

}  // namespace mnemos
