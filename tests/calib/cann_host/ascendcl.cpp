// A library that answers like libascendcl, libacl_op_compiler and libfmk_onnx_parser, on the host's memory: with it the
// real CANN execution provider loads, reads its options, splits graphs, moves tensors and compiles, without a device.
// Its "compiler" knows two programs: one input gives relu(x), two inputs give the matrix product x w (float32).
//
// CANN_HOST_LOG=FILE  what reached the compiler, one line each      CANN_HOST_DEVICES=N  how many devices there are (1)
// CANN_HOST_ONNX=FILE the last ONNX model that was to be compiled   CANN_HOST_FAIL=parse|run  what fails
// CANN_HOST_WRONG=1   results are off by one
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

namespace {

bool asked(const char* name, const char* value) {
  const char* found = getenv(name);
  return found && !strcmp(found, value);
}

void note(const std::string& line) {
  if (const char* path = getenv("CANN_HOST_LOG"))
    if (FILE* file = fopen(path, "a")) {
      fprintf(file, "%s\n", line.c_str());
      fclose(file);
    }
}

using Shape = std::vector<int64_t>;

struct Program {
  std::vector<Shape> inputs;

  // "x:2,64;w:64,8"
  explicit Program(const std::string& text) {
    std::stringstream ports(text);
    for (std::string port; std::getline(ports, port, ';');) {
      std::stringstream sizes(port.substr(port.rfind(':') + 1));
      Shape shape;
      for (std::string size; std::getline(sizes, size, ',');) shape.push_back(std::stoll(size));
      inputs.push_back(shape);
    }
  }
  Shape output() const { return inputs.size() < 2 ? inputs.at(0) : Shape{inputs[0].at(0), inputs[1].at(1)}; }
  static size_t bytes(const Shape& shape) {
    size_t count = sizeof(float);
    for (int64_t size : shape) count *= size;
    return count;
  }
  void run(const std::vector<const float*>& in, float* out) const {
    const float off = asked("CANN_HOST_WRONG", "1") ? 1.f : 0.f;
    if (inputs.size() < 2) {
      for (size_t i = 0; i < bytes(inputs[0]) / sizeof(float); i++) out[i] = (in[0][i] > 0 ? in[0][i] : 0) + off;
      return;
    }
    const int64_t rows = inputs[0].at(0), depth = inputs[0].at(1), columns = inputs[1].at(1);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < columns; c++) {
        float sum = off;
        for (int64_t k = 0; k < depth; k++) sum += in[0][r * depth + k] * in[1][k * columns + c];
        out[r * columns + c] = sum;
      }
  }
};

std::vector<Program>& programs() {
  static std::vector<Program> all;
  return all;
}

struct Buffer {
  void* address;
  size_t size;
};
using Dataset = std::vector<Buffer*>;

void* reserved(size_t size) { return aligned_alloc(64, (size / 64 + 1) * 64); }

}  // namespace

namespace ge {

class AscendString {
 public:
  AscendString(const char* text);
  bool operator<(const AscendString& other) const;
  std::string text() const { return held ? *held : ""; }

 private:
  std::shared_ptr<std::string> held;
};
AscendString::AscendString(const char* text) : held(std::make_shared<std::string>(text ? text : "")) {}
bool AscendString::operator<(const AscendString& other) const { return text() < other.text(); }

class Graph {
 public:
  explicit Graph(const char* name);
  virtual ~Graph();

 private:
  std::shared_ptr<void> held;
};
Graph::Graph(const char*) {}
Graph::~Graph() {}

struct ModelBufferData {
  std::shared_ptr<uint8_t> data;
  uint64_t length;
};
using Options = std::map<AscendString, AscendString>;

uint32_t aclgrphBuildInitialize(Options& options) {
  for (const auto& option : options) note("initialize " + option.first.text() + "=" + option.second.text());
  return 0;
}
void aclgrphBuildFinalize() {}

uint32_t aclgrphParseONNXFromMem(const char* data, size_t size, const Options&, Graph&) {
  if (asked("CANN_HOST_FAIL", "parse")) return 1;
  if (const char* path = getenv("CANN_HOST_ONNX"))
    if (FILE* file = fopen(path, "wb")) {
      fwrite(data, 1, size, file);
      fclose(file);
    }
  note("parse");
  return 0;
}

uint32_t aclgrphBuildModel(const Graph&, const Options& options, ModelBufferData& model) {
  std::string shapes;
  for (const auto& option : options) {
    note("build " + option.first.text() + "=" + option.second.text());
    if (option.first.text() == "input_shape") shapes = option.second.text();
  }
  model.length = shapes.size();
  model.data = std::shared_ptr<uint8_t>(new uint8_t[shapes.size() + 1], std::default_delete<uint8_t[]>());
  memcpy(model.data.get(), shapes.data(), shapes.size());
  return 0;
}

uint32_t aclgrphSaveModel(const char* path, const ModelBufferData&) {
  note(std::string("save ") + path);
  return 0;
}

}  // namespace ge

// What always succeeds. (A C function may be called with more arguments than it looks at.)
#define SUCCEEDS(name) \
  int name(...) { return 0; }
#define A_THING(name) \
  void* name(...) { return calloc(1, 8); }

extern "C" {

SUCCEEDS(aclInit)
SUCCEEDS(aclFinalize)
SUCCEEDS(aclrtCreateEvent)
SUCCEEDS(aclrtDestroyEvent)
SUCCEEDS(aclrtDestroyStream)
SUCCEEDS(aclrtRecordEvent)
SUCCEEDS(aclrtStreamWaitEvent)
SUCCEEDS(aclrtSynchronizeDevice)
SUCCEEDS(aclrtSynchronizeEvent)
SUCCEEDS(aclrtSynchronizeStream)
SUCCEEDS(aclDestroyTensorDesc)
SUCCEEDS(aclSetTensorConst)
SUCCEEDS(aclopDestroyAttr)
SUCCEEDS(aclopSetAttrBool)
SUCCEEDS(aclopSetAttrFloat)
SUCCEEDS(aclopSetAttrInt)
SUCCEEDS(aclopSetAttrListInt)
SUCCEEDS(aclopSetAttrString)
SUCCEEDS(aclmdlUnload)
SUCCEEDS(aclGetTensorDescNumDims)
SUCCEEDS(aclGetTensorDescDimV2)
SUCCEEDS(aclGetTensorDescSize)
A_THING(aclCreateTensorDesc)
A_THING(aclopCreateAttr)

int aclopCompileAndExecute(const char* op, ...) {
  note(std::string("single operator ") + op);
  return 1;
}
const char* aclGetRecentErrMsg() { return "the host library was told to fail"; }
size_t aclDataTypeSize(int type) { return type == 0 ? sizeof(float) : 8; }

int aclrtGetDeviceCount(uint32_t* count) {
  const char* told = getenv("CANN_HOST_DEVICES");
  *count = told ? atoi(told) : 1;
  return 0;
}
int aclrtSetDevice(int device) {
  note("device " + std::to_string(device));
  return 0;
}
int aclrtGetDevice(int* device) {
  *device = 0;
  return 0;
}
const char* aclrtGetSocName() { return "Ascend910B3"; }
int aclrtCreateStream(void** stream) {
  static int one;
  *stream = &one;
  return 0;
}

int aclrtMalloc(void** address, size_t size, int) {
  *address = reserved(size);
  return 0;
}
int aclrtMallocHost(void** address, size_t size) {
  *address = reserved(size);
  return 0;
}
int aclrtFree(void* address) {
  free(address);
  return 0;
}
int aclrtFreeHost(void* address) {
  free(address);
  return 0;
}
int aclrtMemcpy(void* to, size_t, const void* from, size_t size, int) {
  memcpy(to, from, size);
  return 0;
}
int aclrtMemcpyAsync(void* to, size_t, const void* from, size_t size, int, void*) {
  memcpy(to, from, size);
  return 0;
}
int aclrtMemsetAsync(void* to, size_t, int value, size_t size, void*) {
  memset(to, value, size);
  return 0;
}

void* aclCreateDataBuffer(void* address, size_t size) { return new Buffer{address, size}; }
int aclDestroyDataBuffer(const void* buffer) {
  delete static_cast<const Buffer*>(buffer);
  return 0;
}
void* aclGetDataBufferAddr(const void* buffer) { return static_cast<const Buffer*>(buffer)->address; }
void* aclmdlCreateDataset() { return new Dataset; }
int aclmdlDestroyDataset(const void* set) {
  delete static_cast<const Dataset*>(set);
  return 0;
}
int aclmdlAddDatasetBuffer(void* set, void* buffer) {
  static_cast<Dataset*>(set)->push_back(static_cast<Buffer*>(buffer));
  return 0;
}
void* aclmdlGetDatasetBuffer(const void* set, size_t index) { return static_cast<const Dataset*>(set)->at(index); }
void* aclmdlGetDatasetTensorDesc(const void*, size_t) { return nullptr; }

int aclmdlLoadFromMem(const void* model, size_t size, uint32_t* id) {
  programs().emplace_back(std::string(static_cast<const char*>(model), size));
  *id = programs().size() - 1;
  note("load from memory");
  return 0;
}
int aclmdlLoadFromFile(const char* path, uint32_t*) {
  note(std::string("load ") + path);
  return 1;
}

void* aclmdlCreateDesc() { return new uint32_t(0); }
int aclmdlDestroyDesc(void* description) {
  delete static_cast<uint32_t*>(description);
  return 0;
}
int aclmdlGetDesc(void* description, uint32_t id) {
  *static_cast<uint32_t*>(description) = id;
  return 0;
}
static const Program& of(const void* description) { return programs().at(*static_cast<const uint32_t*>(description)); }
size_t aclmdlGetNumInputs(const void* description) { return of(description).inputs.size(); }
size_t aclmdlGetNumOutputs(const void*) { return 1; }
size_t aclmdlGetInputSizeByIndex(const void* description, size_t index) {
  return Program::bytes(of(description).inputs.at(index));
}
size_t aclmdlGetOutputSizeByIndex(const void* description, size_t) { return Program::bytes(of(description).output()); }

struct Dims {  // aclmdlIODims of the AscendCL reference
  char name[128];
  size_t count;
  int64_t sizes[128];
};
int aclmdlGetOutputDims(const void* description, size_t, Dims* dims) {
  const Shape shape = of(description).output();
  memset(dims, 0, sizeof *dims);
  dims->count = shape.size();
  for (size_t i = 0; i < shape.size(); i++) dims->sizes[i] = shape[i];
  return 0;
}

int aclmdlExecuteAsync(uint32_t id, const void* inputs, void* outputs, void*) {
  if (asked("CANN_HOST_FAIL", "run")) return 507018;
  std::vector<const float*> in;
  for (const Buffer* buffer : *static_cast<const Dataset*>(inputs)) in.push_back(static_cast<float*>(buffer->address));
  programs().at(id).run(in, static_cast<float*>(static_cast<Dataset*>(outputs)->at(0)->address));
  note("run");
  return 0;
}
int aclmdlExecute(uint32_t id, const void* inputs, void* outputs) {
  return aclmdlExecuteAsync(id, inputs, outputs, nullptr);
}

}  // extern "C"
