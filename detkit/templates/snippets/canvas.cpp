// Finds products in photos, without detkit:  ./detect photo.jpg [more photos]   (@MODEL@ in the current folder)
// Needs ONNX Runtime's release for C++ (github.com/microsoft/onnxruntime) and stb_image.h (github.com/nothings/stb):
//   g++ -std=c++17 -O2 @FILE@ -I onnxruntime/include -I stb -L onnxruntime/lib -lonnxruntime -o detect
// stb_image leaves photos as they are stored: turn those that EXIF says are on their side first.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <vector>

#include <onnxruntime_cxx_api.h>

#define STB_IMAGE_IMPLEMENTATION
#include "stb_image.h"

static const char *const CLASSES[] = {@CLASSES@};
static const int WIDTH = @WIDTH@, HEIGHT = @HEIGHT@;  // of the canvas, in pixels
static const bool LETTERBOX = @LETTERBOX@;            // whether a photo keeps its shape on it
static const uint8_t FILL[] = {@FILL@};  // RGB of what it leaves free
static const float SCORE = @SCORE@F;     // lowest that is shown

// What a pixel takes of a row or column, and from where on.
struct Weights {
  int first;
  std::vector<double> parts;
};

// Those of each of `to` pixels of one of `from`: antialiased bilinear, as in training.
static std::vector<Weights> weights(int from, int to) {
  const double reach = std::max(double(from) / to, 1.0);
  std::vector<Weights> all;
  for (int i = 0; i < to; i++) {
    const double centre = (i + 0.5) * from / to;
    const int first = std::max(0, int(centre - reach + 0.5)), last = std::min(from, int(centre + reach + 0.5));
    std::vector<double> parts;
    double sum = 0;
    for (int x = first; x < last; x++) {
      parts.push_back(std::max(0.0, 1 - std::fabs((x + 0.5 - centre) / reach)));
      sum += parts.back();
    }
    for (double &part : parts) part /= sum;
    all.push_back({first, parts});
  }
  return all;
}

// Pixels, [height, width, 3], resized to [rows, columns, 3].
static std::vector<uint8_t> resize(const uint8_t *pixels, int height, int width, int rows, int columns) {
  const auto across = weights(width, columns), down = weights(height, rows);
  std::vector<uint8_t> narrow(size_t(height) * columns * 3), small(size_t(rows) * columns * 3);
  for (int y = 0; y < height; y++)
    for (int x = 0; x < columns; x++)
      for (int c = 0; c < 3; c++) {
        double sum = 0.5;
        for (size_t i = 0; i < across[x].parts.size(); i++)
          sum += across[x].parts[i] * pixels[(size_t(y) * width + across[x].first + i) * 3 + c];
        narrow[(size_t(y) * columns + x) * 3 + c] = uint8_t(sum);
      }
  for (int y = 0; y < rows; y++)
    for (int i = 0; i < columns * 3; i++) {
      double sum = 0.5;
      for (size_t k = 0; k < down[y].parts.size(); k++)
        sum += down[y].parts[k] * narrow[(down[y].first + k) * columns * 3 + i];
      small[size_t(y) * columns * 3 + i] = uint8_t(sum);
    }
  return small;
}

int main(int count, char **paths) {
  Ort::Env env(ORT_LOGGING_LEVEL_WARNING);
  Ort::Session session(env, std::filesystem::u8path(@MODEL@).c_str(), Ort::SessionOptions());
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const char *input[] = {"images"}, *outputs[] = {"boxes", "scores", "labels"};
  for (int i = 1; i < count; i++) {
    int width, height, channels;
    unsigned char *pixels = stbi_load(paths[i], &width, &height, &channels, 3);
    if (!pixels) {
      std::fprintf(stderr, "%s: %s\n", paths[i], stbi_failure_reason());
      return 1;
    }
    double scale_x = double(WIDTH) / width, scale_y = double(HEIGHT) / height;
    if (LETTERBOX) scale_x = scale_y = std::min(scale_x, scale_y);
    const int columns = std::max(1, int(std::nearbyint(width * scale_x)));
    const int rows = std::max(1, int(std::nearbyint(height * scale_y)));
    const auto small = resize(pixels, height, width, rows, columns);
    stbi_image_free(pixels);
    std::vector<uint8_t> canvas(size_t(3) * HEIGHT * WIDTH);  // [3, HEIGHT, WIDTH]
    for (int c = 0; c < 3; c++)
      for (int y = 0; y < HEIGHT; y++)
        for (int x = 0; x < WIDTH; x++)
          canvas[(size_t(c) * HEIGHT + y) * WIDTH + x] =
              y < rows && x < columns ? small[(size_t(y) * columns + x) * 3 + c] : FILL[c];
    const int64_t shape[] = {1, 3, HEIGHT, WIDTH};
    const auto images = Ort::Value::CreateTensor<uint8_t>(memory, canvas.data(), canvas.size(), shape, 4);
    const auto found = session.Run(Ort::RunOptions(), input, &images, 1, outputs, 3);
    const float *box = found[0].GetTensorData<float>(), *scores = found[1].GetTensorData<float>();
    const int64_t *labels = found[2].GetTensorData<int64_t>();
    const size_t total = found[1].GetTensorTypeAndShapeInfo().GetElementCount();
    const float across = float(width) / columns, down = float(height) / rows;  // back to pixels of the photo
    for (size_t k = 0; k < total; k++, box += 4) {
      const float x1 = std::clamp(box[0] * across, 0.F, float(width)), y1 = std::clamp(box[1] * down, 0.F, float(height));
      const float x2 = std::clamp(box[2] * across, 0.F, float(width)), y2 = std::clamp(box[3] * down, 0.F, float(height));
      if (scores[k] > 0 && scores[k] >= SCORE && x1 < x2 && y1 < y2)  // a score of 0 is padding
        std::printf("%s\t%s\t%.4f\t%.2f\t%.2f\t%.2f\t%.2f\n", paths[i], CLASSES[labels[k]], scores[k], x1, y1, x2, y2);
    }
  }
}
