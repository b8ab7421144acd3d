// The large parts of a tokenizer.json: its vocabulary and its merges, read without making a Python object of each.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "text/model.h"

namespace mnemos {

class TokenizerJson {
 public:
  // Throws Error (format) where `content` is not JSON, or its `model` not what a tokenizer.json has.
  explicit TokenizerJson(std::string_view content);

  // The file without these parts: `model.vocab` and `model.merges` are null.
  const std::string &rest() const { return rest_; }
  size_t count() const { return entries_.size(); }  // of the vocabulary
  int64_t last() const { return last_; }  // the highest id; -1 without a vocabulary
  bool scored() const { return scored_; }  // the vocabulary is a list of texts and scores
  // The vocabulary by ids, of which there may be `most`.
  std::shared_ptr<const Pieces> pieces() const;
  std::vector<double> scores() const { return scores_; }
  std::vector<std::string_view> merges() const;  // two halves with a space between each

 private:
  friend class JsonReader;
  struct Entry {
    size_t begin, end;  // in texts_
    int64_t id;
  };
  std::string_view text(size_t begin, size_t end) const { return std::string_view(texts_).substr(begin, end - begin); }

  std::string rest_, texts_;
  std::vector<Entry> entries_;
  std::vector<double> scores_;
  std::vector<std::pair<size_t, size_t>> merges_;  // begin and end of each, in texts_
  int64_t last_ = -1;
  bool scored_ = false;
};

}  // namespace mnemos
