// The tokenizers as Python sees them.
#include "text/bind.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "system/error.h"
#include "text/encoder.h"
#include "text/tokenizer_json.h"
#include "text/unicode.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mnemos {
namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Doubles = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using PiecesPointer = std::shared_ptr<const Pieces>;
using ModelPointer = std::shared_ptr<TextModel>;
// text, id, single_word, left, right, normalized, ignored
using AddedTuple = std::tuple<std::string, int32_t, bool, bool, bool, bool, bool>;
// unknown, fuse_unknown, byte_fallback, ignore_merges, prefix, suffix
using BpeTuple = std::tuple<int32_t, bool, bool, bool, std::string, std::string>;

std::string_view view(const Bytes &bytes) { return {reinterpret_cast<const char *>(bytes.data()), bytes.size()}; }

BpeOptions bpe_options(const BpeTuple &values) {
  BpeOptions options;
  std::tie(options.unknown, options.fuse_unknown, options.byte_fallback, options.ignore_merges, options.prefix,
           options.suffix) = values;
  return options;
}

template <typename Enum>
Enum chosen(const std::string &name, const std::vector<std::pair<const char *, Enum>> &choices) {
  for (const auto &[known, value] : choices)
    if (name == known) return value;
  throw unsupported_error("'" + name + "' is not known");
}

MatchUse match_use(const std::string &name) {
  return chosen<MatchUse>(name, {{"Isolated", MatchUse::isolated},
                                 {"Removed", MatchUse::removed},
                                 {"Contiguous", MatchUse::contiguous},
                                 {"MergedWithPrevious", MatchUse::with_previous},
                                 {"MergedWithNext", MatchUse::with_next}});
}

std::vector<AddedToken> added_tokens(const std::vector<AddedTuple> &values) {
  std::vector<AddedToken> tokens;
  for (const AddedTuple &value : values) {
    AddedToken &token = tokens.emplace_back();
    std::tie(token.text, token.id, token.single_word, token.left, token.right, token.normalized, token.ignored) = value;
  }
  return tokens;
}

void bind_models(nb::module_ &m) {
  nb::class_<TextModel>(m, "TextModel");
  m.def(
      "bpe",
      [](PiecesPointer pieces, const std::vector<std::string_view> &merges, const BpeTuple &options) {
        return ModelPointer(make_bpe(pieces, merges, bpe_options(options)));
      },
      "pieces"_a, "merges"_a, "options"_a);
  m.def(
      "bpe_of_strings",
      [](PiecesPointer pieces, Bytes merges, uint64_t count, const BpeTuple &options) {
        nb::gil_scoped_release release_gil;
        return ModelPointer(make_bpe(pieces, split_strings(view(merges), count), bpe_options(options)));
      },
      "pieces"_a, "merges"_a, "count"_a, "options"_a);
  m.def(
      "scored_bpe",
      [](PiecesPointer pieces, Ints order, const BpeTuple &options) {
        return ModelPointer(make_scored_bpe(pieces, {order.data(), order.data() + order.size()}, bpe_options(options)));
      },
      "pieces"_a, "order"_a, "options"_a);
  m.def(
      "unigram",
      [](PiecesPointer pieces, Doubles scores, const std::vector<int32_t> &hidden, int32_t unknown,
         bool byte_fallback) {
        return ModelPointer(
            make_unigram(pieces, {scores.data(), scores.data() + scores.size()}, hidden, unknown, byte_fallback));
      },
      "pieces"_a, "scores"_a, "hidden"_a, "unknown"_a, "byte_fallback"_a);
  m.def(
      "word_piece",
      [](PiecesPointer pieces, int32_t unknown, const std::string &prefix, size_t most_characters) {
        return ModelPointer(make_word_piece(pieces, unknown, prefix, most_characters));
      },
      "pieces"_a, "unknown"_a, "prefix"_a, "most_characters"_a);
  m.def(
      "word_level",
      [](PiecesPointer pieces, int32_t unknown) { return ModelPointer(make_word_level(pieces, unknown)); }, "pieces"_a,
      "unknown"_a);
}

void bind_encoder(nb::module_ &m) {
  nb::class_<Encoder>(m, "Encoder")
      .def(
          "__init__", [](Encoder *encoder, ModelPointer model) { new (encoder) Encoder(std::move(model)); }, "model"_a)
      .def(
          "normalize",
          [](Encoder &e, const std::string &kind) {
            e.add_normalizer(make_simple_normalizer(
                chosen<SimpleNormalizer>(kind, {{"NFC", SimpleNormalizer::NFC},
                                                {"NFD", SimpleNormalizer::NFD},
                                                {"NFKC", SimpleNormalizer::NFKC},
                                                {"NFKD", SimpleNormalizer::NFKD},
                                                {"Lowercase", SimpleNormalizer::lowercase},
                                                {"StripAccents", SimpleNormalizer::strip_accents},
                                                {"StripLeft", SimpleNormalizer::strip_left},
                                                {"StripRight", SimpleNormalizer::strip_right},
                                                {"ByteLevel", SimpleNormalizer::byte_level}})));
          },
          "kind"_a)
      .def(
          "normalize_bert",
          [](Encoder &e, bool clean, bool space_chinese, bool strip_accents, bool lowercase) {
            e.add_normalizer(make_bert_normalizer({clean, space_chinese, strip_accents, lowercase}));
          },
          "clean"_a, "space_chinese"_a, "strip_accents"_a, "lowercase"_a)
      .def(
          "prepend", [](Encoder &e, const std::string &text) { e.add_normalizer(make_prepend(text)); }, "text"_a)
      .def(
          "replace",
          [](Encoder &e, const std::string &pattern, bool literal, const std::string &content) {
            e.add_normalizer(make_replace(pattern, literal, content));
          },
          "pattern"_a, "literal"_a, "content"_a)
      .def(
          "map_characters",
          [](Encoder &e, nb::bytes table) {
            e.add_normalizer(make_character_map({table.c_str(), table.size()}));
          },
          "table"_a)
      .def(
          "cut_at",
          [](Encoder &e, const std::string &pattern, bool literal, const std::string &use, bool inverted) {
            e.add_cutter(make_regex_cutter(pattern, literal, match_use(use), inverted));
          },
          "pattern"_a, "literal"_a, "use"_a, "inverted"_a)
      .def(
          "cut_at_characters",
          [](Encoder &e, const std::string &kind, const std::string &use) {
            const auto flag = chosen<CharacterFlag>(
                kind, {{"space", space_flag}, {"numeric", numeric_flag}, {"punctuation", punctuation_flag}});
            e.add_cutter(make_character_cutter(flag, match_use(use)));
          },
          "kind"_a, "use"_a)
      .def("cut_words", [](Encoder &e) { e.add_cutter(make_word_cutter()); })
      .def(
          "cut_bytes",
          [](Encoder &e, bool adds_space, bool splits) { e.add_cutter(make_byte_cutter(adds_space, splits)); },
          "adds_space"_a, "splits"_a)
      .def(
          "cut_marks",
          [](Encoder &e, const std::string &mark, const std::string &use, bool splits) {
            e.add_cutter(make_mark_cutter(
                mark,
                chosen<SpaceUse>(
                    use, {{"always", SpaceUse::always}, {"first", SpaceUse::first}, {"never", SpaceUse::never}}),
                splits));
          },
          "mark"_a, "use"_a, "splits"_a)
      .def(
          "set_added",
          [](Encoder &e, const std::vector<AddedTuple> &tokens, const std::vector<AddedTuple> &plain) {
            e.set_added(added_tokens(tokens), added_tokens(plain));
          },
          "tokens"_a, "plain"_a)
      .def("surround", &Encoder::surround, "before"_a, "after"_a)
      .def(
          "encode",
          [](const Encoder &e, std::string_view text, bool add_special, bool parse_special) {
            Ids ids;
            {
              nb::gil_scoped_release release_gil;
              ids = e.encode(text, add_special, parse_special);
            }
            nb::list result = nb::steal<nb::list>(PyList_New(static_cast<Py_ssize_t>(ids.size())));
            for (size_t i = 0; i < ids.size(); i++)
              PyList_SetItem(result.ptr(), static_cast<Py_ssize_t>(i), PyLong_FromLong(ids[i]));
            return result;
          },
          "text"_a, "add_special"_a, "parse_special"_a);
}

}  // namespace

void bind_text(nb::module_ &m) {
  nb::class_<Pieces>(m, "Pieces")
      .def(
          "__init__", [](Pieces *pieces, const std::vector<std::string_view> &texts) { new (pieces) Pieces(texts); },
          "texts"_a)
      .def_static(
          "of_strings",
          [](Bytes buffer, uint64_t count) {
            nb::gil_scoped_release release_gil;
            return std::make_shared<Pieces>(split_strings(view(buffer), count));
          },
          "buffer"_a, "count"_a)
      .def("__len__", &Pieces::size)
      .def(
          "text",
          [](const Pieces &pieces, size_t number) {
            if (number >= pieces.size()) throw nb::index_error();
            return pieces.text(number);
          },
          "number"_a)
      .def("find", &Pieces::find, "text"_a)
      .def("empty_numbers", &Pieces::empty_numbers);
  bind_models(m);
  bind_encoder(m);
  nb::class_<TokenizerJson>(m, "TokenizerJson")
      .def(
          "__init__",
          [](TokenizerJson *file, nb::bytes content) {
            new (file) TokenizerJson({content.c_str(), content.size()});
          },
          "content"_a)
      .def_prop_ro("rest", [](const TokenizerJson &file) { return nb::bytes(file.rest().data(), file.rest().size()); })
      .def_prop_ro("count", &TokenizerJson::count)
      .def_prop_ro("last", &TokenizerJson::last)
      .def_prop_ro("scored", &TokenizerJson::scored)
      .def("pieces", [](const TokenizerJson &file) { return std::const_pointer_cast<Pieces>(file.pieces()); })
      .def(
          "bpe",
          [](const TokenizerJson &file, PiecesPointer pieces, const BpeTuple &options) {
            return ModelPointer(make_bpe(pieces, file.merges(), bpe_options(options)));
          },
          "pieces"_a, "options"_a)
      .def(
          "unigram",
          [](const TokenizerJson &file, PiecesPointer pieces, int32_t unknown, bool byte_fallback) {
            return ModelPointer(make_unigram(pieces, file.scores(), {}, unknown, byte_fallback));
          },
          "pieces"_a, "unknown"_a, "byte_fallback"_a);
}

}  // namespace mnemos
