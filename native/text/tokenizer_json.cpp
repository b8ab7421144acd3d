#include "text/tokenizer_json.h"

#include <algorithm>
#include <cstdlib>

#include "system/error.h"
#include "text/unicode.h"

namespace mnemos {

class JsonReader {
 public:
  JsonReader(std::string_view content, TokenizerJson &file) : content_(content), file_(file) {}

  void read() {
    object([&](std::string_view key) {
      if (key == "model" && peek() == '{')
        object([&](std::string_view name) { model_field(name); });
      else
        skip();
    });
    if (peek() != 0) refuse("more after its end");
    file_.rest_.append(content_.substr(copied_));
  }

 private:
  [[noreturn]] void refuse(const std::string &what) const {
    throw format_error("has " + what + " at byte " + std::to_string(at_));
  }

  void model_field(std::string_view name) {
    if (name != "vocab" && name != "merges") return skip();
    file_.rest_.append(content_.substr(copied_, at_ - copied_)).append("null");
    if (name == "merges")
      list([&] { merge(); });
    else if (peek() == '[')
      list([&] { scored_entry(); });
    else
      object([&](std::string_view) { entry(); });
    copied_ = at_;
  }

  // After the key: an id. The key is still the last text.
  void entry() {
    const size_t begin = key_begin_, end = file_.texts_.size();
    const std::string_view digits = number();
    int64_t id = 0;
    for (const char digit : digits) {
      if (digit < '0' || digit > '9' || id > UINT32_MAX) refuse("no id in model.vocab");
      id = id * 10 + (digit - '0');
    }
    add(begin, end, id);
  }

  void scored_entry() {
    int part = 0;
    size_t begin = 0, end = 0;
    list([&] {
      if (part == 0) {
        begin = string();
        end = file_.texts_.size();
      } else {
        file_.scores_.push_back(score());
      }
      part++;
    });
    if (part != 2) refuse("an entry of model.vocab that is not a text and a score");
    file_.scored_ = true;
    add(begin, end, static_cast<int64_t>(file_.entries_.size()));
  }

  void add(size_t begin, size_t end, int64_t id) {
    file_.entries_.push_back({begin, end, id});
    file_.last_ = std::max(file_.last_, id);
  }

  void merge() {
    std::string &texts = file_.texts_;
    const size_t begin = texts.size();
    if (peek() == '[') {
      int parts = 0;
      list([&] {
        if (parts++ == 1) texts += ' ';
        string();
      });
      if (parts != 2) refuse("a merge that is not two texts");
    } else {
      string();
    }
    // With a space within a half, it could be divided elsewhere.
    const std::string_view text = file_.text(begin, texts.size());
    const size_t divider = text.find(' ');
    if (divider == 0 || divider + 1 >= text.size() || text.find(' ', divider + 1) != std::string_view::npos)
      throw unsupported_error("a merge of '" + std::string(text.substr(0, 80)) + "' is not supported");
    file_.merges_.emplace_back(begin, texts.size());
  }

  char peek() {
    while (at_ < content_.size() &&
           (content_[at_] == ' ' || content_[at_] == '\n' || content_[at_] == '\r' || content_[at_] == '\t'))
      at_++;
    return at_ < content_.size() ? content_[at_] : '\0';
  }
  void expect(char c) {
    if (peek() != c) refuse(std::string("no ") + c);
    at_++;
  }

  // field(key): reads what comes after the key.
  template <typename Field>
  void object(const Field &field) {
    expect('{');
    if (peek() == '}') {
      at_++;
      return;
    }
    for (;;) {
      key_begin_ = string();
      const std::string key(file_.text(key_begin_, file_.texts_.size()));
      expect(':');
      peek();
      field(key);
      if (peek() == '}') break;
      expect(',');
    }
    at_++;
  }

  template <typename Item>
  void list(const Item &item) {
    expect('[');
    if (peek() == ']') {
      at_++;
      return;
    }
    for (;;) {
      item();
      if (peek() == ']') break;
      expect(',');
    }
    at_++;
  }

  // Appends a string to the texts, and says where it begins there.
  size_t string() {
    expect('"');
    std::string &texts = file_.texts_;
    const size_t begin = texts.size();
    for (;;) {
      const size_t plain = at_;
      while (at_ < content_.size() && content_[at_] != '"' && content_[at_] != '\\') {
        if (static_cast<uint8_t>(content_[at_]) < 0x20) refuse("a control character in a string");
        at_++;
      }
      texts.append(content_.substr(plain, at_ - plain));
      if (at_ + 1 >= content_.size() && !(at_ < content_.size() && content_[at_] == '"'))
        refuse("a string without an end");
      if (content_[at_++] == '"') return begin;
      escape();
    }
  }

  void escape() {
    const char letter = content_[at_++];
    constexpr std::string_view letters = "\"\\/bfnrt", meant = "\"\\/\b\f\n\r\t";
    const size_t found = letters.find(letter);
    if (found != std::string_view::npos) {
      file_.texts_ += meant[found];
      return;
    }
    if (letter != 'u') refuse("an unknown escape");
    char32_t c = hexadecimal();
    if (c >= 0xD800 && c < 0xDC00 && content_.substr(at_, 2) == "\\u") {
      at_ += 2;
      const char32_t low = hexadecimal();
      if (low < 0xDC00 || low > 0xDFFF) refuse("half a surrogate pair");
      c = 0x10000 + ((c - 0xD800) << 10) + (low - 0xDC00);
    }
    if (c >= 0xD800 && c < 0xE000) refuse("half a surrogate pair");
    append_character(file_.texts_, c);
  }

  char32_t hexadecimal() {
    char32_t value = 0;
    for (int i = 0; i < 4; i++) {
      const char d = at_ < content_.size() ? content_[at_++] : '\0';
      const char lower = static_cast<char>(d | 32);
      if (d >= '0' && d <= '9')
        value = value * 16 + static_cast<char32_t>(d - '0');
      else if (lower >= 'a' && lower <= 'f')
        value = value * 16 + static_cast<char32_t>(lower - 'a' + 10);
      else
        refuse("no hexadecimal number");
    }
    return value;
  }

  std::string_view number() {
    peek();
    const size_t begin = at_;
    while (at_ < content_.size() && std::string_view("+-.0123456789eE").find(content_[at_]) != std::string_view::npos)
      at_++;
    if (at_ == begin) refuse("no number");
    return content_.substr(begin, at_ - begin);
  }

  // A number as the usual reader of these files makes it of its digits: rounded once as a whole number, and once more
  // by its power of ten. Of two texts with nearly the same score the last bit decides.
  double score() {
    std::string_view digits = number();
    const bool negative = digits[0] == '-';
    if (negative) digits.remove_prefix(1);
    uint64_t significand = 0;
    int64_t exponent = 0;
    size_t i = 0;
    bool fraction = false, full = false;
    for (; i < digits.size() && digits[i] != 'e' && digits[i] != 'E'; i++) {
      if (digits[i] == '.') {
        if (fraction) refuse("a number with two points");
        fraction = true;
        continue;
      }
      if (digits[i] < '0' || digits[i] > '9') refuse("no number");
      uint64_t longer = 0;
      full = full || __builtin_mul_overflow(significand, uint64_t(10), &longer) ||
             __builtin_add_overflow(longer, static_cast<uint64_t>(digits[i] - '0'), &longer);
      if (!full) significand = longer;
      exponent += (full ? 1 : 0) - (fraction ? 1 : 0);
    }
    if (i < digits.size()) {
      const long stated = std::strtol(std::string(digits.substr(i + 1)).c_str(), nullptr, 10);
      exponent += std::clamp(stated, -100000L, 100000L);
    }
    double value = static_cast<double>(significand);
    constexpr int64_t most = 308;
    for (; exponent < -most && value != 0; exponent += most) value /= 1e308;
    if (value != 0) {
      if (exponent > most) refuse("a score beyond all numbers");
      const double power = std::strtod(("1e" + std::to_string(std::abs(exponent))).c_str(), nullptr);
      value = exponent >= 0 ? value * power : value / power;
    }
    return negative ? -value : value;
  }

  // Any value. It is read again by a stricter reader, as part of the rest.
  void skip() {
    size_t depth = 0;
    do {
      const char c = peek();
      if (c == 0) refuse("no end");
      if (c == '"') {
        at_++;
        while (at_ < content_.size() && content_[at_] != '"') at_ += content_[at_] == '\\' ? 2 : 1;
        if (at_ >= content_.size()) refuse("a string without an end");
        at_++;
      } else if (c == '{' || c == '[') {
        depth++, at_++;
      } else if (c == '}' || c == ']') {
        if (depth == 0) refuse("no value");
        depth--, at_++;
      } else if (c == ',' || c == ':') {
        if (depth == 0) refuse("no value");
        at_++;
      } else {
        while (at_ < content_.size() &&
               std::string_view(",:{}[]\" \n\r\t").find(content_[at_]) == std::string_view::npos)
          at_++;
      }
    } while (depth > 0);
  }

  std::string_view content_;
  TokenizerJson &file_;
  size_t at_ = 0, copied_ = 0, key_begin_ = 0;
};

TokenizerJson::TokenizerJson(std::string_view content) { JsonReader(content, *this).read(); }

std::shared_ptr<const Pieces> TokenizerJson::pieces() const {
  std::vector<std::string_view> texts(static_cast<size_t>(last_ + 1));
  for (const Entry &entry : entries_) {
    std::string_view &place = texts[static_cast<size_t>(entry.id)];
    if (!place.empty()) throw format_error("model.vocab has two tokens with the id " + std::to_string(entry.id));
    place = text(entry.begin, entry.end);
  }
  return std::make_shared<const Pieces>(texts);
}

std::vector<std::string_view> TokenizerJson::merges() const {
  std::vector<std::string_view> found;
  found.reserve(merges_.size());
  for (const auto &[begin, end] : merges_) found.push_back(text(begin, end));
  return found;
}

}  // namespace mnemos
