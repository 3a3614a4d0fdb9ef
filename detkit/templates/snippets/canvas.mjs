// Finds products in photos, without detkit:  node @FILE@ photo.jpg [more photos]
// Needs:  npm install onnxruntime-node sharp
import { fileURLToPath } from "node:url";
import ort from "onnxruntime-node";
import sharp from "sharp";

const MODEL = fileURLToPath(new URL(encodeURIComponent(@MODEL@), import.meta.url));
const CLASSES = @CLASSES@;
const [WIDTH, HEIGHT] = [@WIDTH@, @HEIGHT@]; // of the canvas, in pixels
const LETTERBOX = @LETTERBOX@; // whether a photo keeps its shape on it
const FILL = [@FILL@]; // RGB of what it leaves free
const SCORE = @SCORE@; // lowest that is shown

const session = await ort.InferenceSession.create(MODEL);

// The nearest whole number, and of two the even one.
function round(value) {
  const near = Math.round(value);
  return near - value === 0.5 && near % 2 ? near - 1 : near;
}

// What each pixel of a row or column of `to` pixels takes of one of `from`: antialiased bilinear, as in training.
function weights(from, to) {
  const reach = Math.max(from / to, 1);
  return Array.from({ length: to }, (_, i) => {
    const centre = ((i + 0.5) * from) / to;
    const first = Math.max(0, Math.trunc(centre - reach + 0.5));
    const last = Math.min(from, Math.trunc(centre + reach + 0.5));
    const parts = [];
    for (let x = first; x < last; x++) parts.push(Math.max(0, 1 - Math.abs((x + 0.5 - centre) / reach)));
    const sum = parts.reduce((a, b) => a + b);
    return { first, parts: parts.map((part) => part / sum) };
  });
}

// Pixels, uint8 [height, width, 3], resized to [rows, columns, 3].
function resize(pixels, height, width, rows, columns) {
  const narrow = new Uint8ClampedArray(height * columns * 3);
  weights(width, columns).forEach(({ first, parts }, x) => {
    for (let y = 0; y < height; y++)
      for (let c = 0; c < 3; c++) {
        let sum = 0;
        parts.forEach((part, i) => (sum += part * pixels[(y * width + first + i) * 3 + c]));
        narrow[(y * columns + x) * 3 + c] = Math.floor(sum + 0.5);
      }
  });
  const small = new Uint8ClampedArray(rows * columns * 3);
  weights(height, rows).forEach(({ first, parts }, y) => {
    for (let i = 0; i < columns * 3; i++) {
      let sum = 0;
      parts.forEach((part, k) => (sum += part * narrow[(first + k) * columns * 3 + i]));
      small[y * columns * 3 + i] = Math.floor(sum + 0.5);
    }
  });
  return small;
}

for (const path of process.argv.slice(2)) {
  const { data, info } = await sharp(path).rotate().flatten({ background: "white" }).toColourspace("srgb").raw()
    .toBuffer({ resolveWithObject: true });
  let [scaleX, scaleY] = [WIDTH / info.width, HEIGHT / info.height];
  if (LETTERBOX) scaleX = scaleY = Math.min(scaleX, scaleY);
  const columns = Math.max(1, round(info.width * scaleX));
  const rows = Math.max(1, round(info.height * scaleY));
  const small = resize(data, info.height, info.width, rows, columns);
  const canvas = new Uint8Array(3 * HEIGHT * WIDTH); // [3, HEIGHT, WIDTH]
  for (let c = 0; c < 3; c++)
    for (let y = 0; y < HEIGHT; y++)
      for (let x = 0; x < WIDTH; x++)
        canvas[(c * HEIGHT + y) * WIDTH + x] = y < rows && x < columns ? small[(y * columns + x) * 3 + c] : FILL[c];
  const images = new ort.Tensor("uint8", canvas, [1, 3, HEIGHT, WIDTH]);
  const { boxes, scores, labels } = await session.run({ images });
  scores.data.forEach((score, i) => {
    if (score < SCORE || score === 0) return; // a score of 0 is padding
    const [across, down] = [info.width / columns, info.height / rows]; // back to pixels of the photo
    const [x1, y1, x2, y2] = boxes.data.subarray(4 * i, 4 * i + 4);
    const box = [
      Math.min(Math.max(x1 * across, 0), info.width), Math.min(Math.max(y1 * down, 0), info.height),
      Math.min(Math.max(x2 * across, 0), info.width), Math.min(Math.max(y2 * down, 0), info.height),
    ];
    if (box[0] >= box[2] || box[1] >= box[3]) return;
    const row = [path, CLASSES[Number(labels.data[i])], score.toFixed(4), ...box.map((side) => side.toFixed(2))];
    console.log(row.join("\t"));
  });
}
