// Finds products in photos, without detkit:  node @FILE@ photo.jpg [more photos]
// Needs:  npm install onnxruntime-node sharp
import { fileURLToPath } from "node:url";
import ort from "onnxruntime-node";
import sharp from "sharp";

const MODEL = fileURLToPath(new URL(encodeURIComponent(@MODEL@), import.meta.url));
const CLASSES = @CLASSES@;
const SCORE = @SCORE@; // lowest that is shown

const session = await ort.InferenceSession.create(MODEL);

for (const path of process.argv.slice(2)) {
  const { data, info } = await sharp(path).rotate().flatten({ background: "white" }).toColourspace("srgb").raw()
    .toBuffer({ resolveWithObject: true });
  const image = new ort.Tensor("uint8", new Uint8Array(data), [info.height, info.width, 3]);
  const { boxes, scores, labels } = await session.run({ image }); // in pixels of the photo
  scores.data.forEach((score, i) => {
    if (score < SCORE) return;
    const box = [...boxes.data.subarray(4 * i, 4 * i + 4)].map((side) => side.toFixed(2));
    console.log([path, CLASSES[Number(labels.data[i])], score.toFixed(4), ...box].join("\t"));
  });
}
