// Finds products in photos, without detkit:  ./detect photo.jpg [more photos]   (@MODEL@ in the current folder)
// Needs ONNX Runtime's release for C++ (github.com/microsoft/onnxruntime) and stb_image.h (github.com/nothings/stb):
//   g++ -std=c++17 -O2 @FILE@ -I onnxruntime/include -I stb -L onnxruntime/lib -lonnxruntime -o detect
// stb_image leaves photos as they are stored: turn those that EXIF says are on their side first.
#include <cstdint>
#include <cstdio>
#include <filesystem>

#include <onnxruntime_cxx_api.h>

#define STB_IMAGE_IMPLEMENTATION
#include "stb_image.h"

static const char *const CLASSES[] = {@CLASSES@};
static const float SCORE = @SCORE@F;  // lowest that is shown

int main(int count, char **paths) {
  Ort::Env env(ORT_LOGGING_LEVEL_WARNING);
  Ort::Session session(env, std::filesystem::u8path(@MODEL@).c_str(), Ort::SessionOptions());
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const char *input[] = {"image"}, *outputs[] = {"boxes", "scores", "labels"};
  for (int i = 1; i < count; i++) {
    int width, height, channels;
    unsigned char *pixels = stbi_load(paths[i], &width, &height, &channels, 3);
    if (!pixels) {
      std::fprintf(stderr, "%s: %s\n", paths[i], stbi_failure_reason());
      return 1;
    }
    const int64_t shape[] = {height, width, 3};
    const auto image = Ort::Value::CreateTensor<uint8_t>(memory, pixels, size_t(height) * width * 3, shape, 3);
    const auto found = session.Run(Ort::RunOptions(), input, &image, 1, outputs, 3);
    const float *box = found[0].GetTensorData<float>(), *scores = found[1].GetTensorData<float>();
    const int64_t *labels = found[2].GetTensorData<int64_t>();
    const size_t total = found[1].GetTensorTypeAndShapeInfo().GetElementCount();
    for (size_t k = 0; k < total; k++, box += 4)  // in pixels of the photo
      if (scores[k] >= SCORE)
        std::printf("%s\t%s\t%.4f\t%.2f\t%.2f\t%.2f\t%.2f\n", paths[i], CLASSES[labels[k]], scores[k], box[0], box[1],
                    box[2], box[3]);
    stbi_image_free(pixels);
  }
}
