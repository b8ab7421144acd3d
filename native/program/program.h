// A recorded forward pass, ready to run on any batch: one parallel region of the pool for each step.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "program/graph.h"
#include "system/pool.h"

namespace mnemos {

// Memory of one step. Results are views of it, so it lives as long as they do.
class Workspace {
 public:
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace &) = delete;
  Workspace &operator=(const Workspace &) = delete;
  uint8_t *const data;
  const size_t bytes;
};

struct OutputView {
  const void *data;
  int64_t rows, width;
  ValueType type;
  std::shared_ptr<Workspace> owner;
};

struct InputView {
  const void *data;
  int64_t rows, width;
  ValueType type;
};

class Program {
 public:
  // caches: one for each layer group, with equal heads and pages; a sequence has a page table for each.
  Program(std::shared_ptr<Pool> pool, std::vector<std::shared_ptr<Cache>> caches);

  // Recording. Values are numbers; all shapes are checked here. Throws Error (config).
  int input(int64_t width, ValueType type);
  int embed(MatrixPointer matrix, Index index);
  int choose_rows(int x);
  int linear(int x, MatrixPointer matrix, VectorPointer bias);
  int norm(int x, Norm norm);
  int rope(int x, std::vector<float> frequencies, int64_t head_dim, float magnitude);
  int attention(int q, int k, int v, Attention attention);
  int elementwise(Elementwise operation, int x, int second);
  std::pair<int, int> route(int x, MatrixPointer matrix, int64_t top_k, bool normalise);
  std::pair<int, int> choose(int logits, int64_t top_k);
  int pool(int x, Pooling pooling);
  int memory(int q, int ids, int weights, MemoryAttention memory);  // ids and weights: -1 without chapters
  int experts(int x, int ids, int weights, Experts experts);
  // y + what each row's adapter makes of x. Nothing else may use y, whose memory the result takes.
  int low_rank(int y, int x, std::shared_ptr<LowRank> factors);
  int64_t width(int value) const;
  // Ends the recording.
  void finish(std::vector<int> outputs);

  // Runs one step. The batch and the inputs are checked first: throws Error (request, config) before anything is
  // changed. The views are overwritten by the next step. With `batch.argmax`, which needs finds_argmax(), the last
  // output (rows, 1) is replaced by the index of each row's largest value, the lowest on ties, or -1 if none is above
  // minus infinity or one is not a number below infinity.
  std::vector<OutputView> run(const BatchView &batch, const std::vector<InputView> &inputs);

  // Whether the largest values of the last output can be found without computing all of it.
  bool finds_argmax() const { return schedule_.argmax_buffer >= 0; }

  // Fills the workspace with NaN before each step, so that reads of unwritten memory show.
  void poison(bool on) { poison_ = on; }
  // The most bytes of workspace that a step with this many tokens and chosen rows needs, not counting long contexts.
  int64_t workspace_bytes(int64_t tokens, int64_t chosen) const;
  int64_t tasks() const { return static_cast<int64_t>(schedule_.tasks.size()); }
  int64_t barriers() const;

 private:
  struct Slot {
    std::vector<int> buffers;
    bool copies = false;  // each thread has its own when there is one row
    int64_t offset = 0, bytes = 0;
  };

  int add_operator(Operator op, std::vector<Value> outputs);
  const Value &checked_value(int value) const;
  void assign_slots();
  void place_barriers();
  int64_t buffer_bytes(const BufferSpec &spec, const BatchView &batch, const std::vector<TileSet> &tiles) const;
  int64_t layout(const BatchView &batch, const std::vector<TileSet> &tiles, bool one_row);
  void check_batch(const BatchView &batch) const;
  void check_sights(const BatchView &batch) const;
  void check_sequence(const BatchView &batch, int64_t sequence) const;
  void check_table(const BatchView &batch, int64_t sequence, int64_t group) const;
  void check_inputs(const BatchView &batch, const std::vector<InputView> &inputs) const;
  void prepare_far_pages(const BatchView &batch);
  void bring_pages(const BatchView &batch, size_t group);
  void put_away_pages(const BatchView &batch, size_t group);
  void execute(const Step &step, bool one_row);
  void plan_phases(const Step &step, bool one_row);
  void approach(const Step &step, size_t task, int thread);

  const std::shared_ptr<Pool> pool_;
  const std::vector<std::shared_ptr<Cache>> caches_;  // by layer group
  const VectorKernels *const kernels_;
  Graph graph_;
  Schedule schedule_;
  bool finished_ = false, poison_ = false;
  std::vector<int> changed_;  // values that adapters are added to
  std::vector<std::shared_ptr<RopeTable>> rope_tables_;
  std::vector<int> slot_of_;  // by buffer
  std::vector<Slot> slots_;
  std::vector<char> barrier_before_[2];  // by task; [1]: for one row
  std::vector<size_t> fetching_from_;  // by task: the first one from it on that fetches ahead; their number if none
  std::vector<std::unique_ptr<Ahead>> ahead_;  // by thread
  struct alignas(64) Fetching {
    size_t task = 0;  // whose memory the thread fetches; the number of tasks: none yet
  };
  std::vector<Fetching> fetching_now_;  // by thread
  std::vector<size_t> active_;  // tasks that the step needs
  std::vector<size_t> phases_;  // where each phase begins in active_, and the end
  std::vector<Piece> pieces_;
  std::vector<Tables> tables_;  // by layer group
  std::shared_ptr<Workspace> workspace_;
  int64_t scratch_offset_ = 0, scratch_bytes_ = 0;
  struct alignas(64) Counter {
    std::atomic<int64_t> taken{0};
  };
  std::unique_ptr<Counter[]> counters_;
  std::mutex mutex_;
};

}  // namespace mnemos
