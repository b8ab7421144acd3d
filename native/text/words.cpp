// WordPiece and whole words.
#include "system/error.h"
#include "text/model.h"
#include "text/unicode.h"

namespace mnemos {
namespace {

class WordPiece : public TextModel {
 public:
  WordPiece(std::shared_ptr<const Pieces> pieces, int32_t unknown, std::string prefix, size_t most_characters)
      : TextModel(std::move(pieces)), unknown_(unknown), prefix_(std::move(prefix)), most_(most_characters) {}

  void encode(std::string_view word, Ids &ids, Scratch &scratch) const override {
    const size_t first = ids.size();
    bool known = count_characters(word) <= most_;
    for (size_t begin = 0; known && begin < word.size();) {
      size_t end = word.size();
      int32_t id = -1;
      for (; end > begin; previous_character(word, end)) {
        scratch.text.clear();
        if (begin > 0) scratch.text += prefix_;
        scratch.text += word.substr(begin, end - begin);
        id = pieces_->find(scratch.text);
        if (id >= 0) break;
      }
      known = id >= 0;
      if (known) ids.push_back(id);
      begin = end;
    }
    if (known) return;
    ids.resize(first);
    if (unknown_ < 0) throw request_error("a word is not in the vocabulary, and there is no unknown token");
    ids.push_back(unknown_);
  }

 private:
  int32_t unknown_;
  std::string prefix_;
  size_t most_;
};

class WordLevel : public TextModel {
 public:
  WordLevel(std::shared_ptr<const Pieces> pieces, int32_t unknown) : TextModel(std::move(pieces)), unknown_(unknown) {}

  void encode(std::string_view word, Ids &ids, Scratch &) const override {
    const int32_t found = pieces_->find(word), id = found >= 0 ? found : unknown_;
    if (id < 0) throw request_error("a word is not in the vocabulary, and there is no unknown token");
    ids.push_back(id);
  }

 private:
  int32_t unknown_;
};

}  // namespace

std::unique_ptr<TextModel> make_word_piece(std::shared_ptr<const Pieces> pieces, int32_t unknown, std::string prefix,
                                           size_t most_characters) {
  return std::make_unique<WordPiece>(std::move(pieces), unknown, std::move(prefix), most_characters);
}

std::unique_ptr<TextModel> make_word_level(std::shared_ptr<const Pieces> pieces, int32_t unknown) {
  return std::make_unique<WordLevel>(std::move(pieces), unknown);
}

}  // namespace mnemos
