// Run exported models in Node.js on the images of a folder, and decode the same images with sharp.
//
//     NODE_PATH=node_modules node export_node.js FOLDER
//
// The folder has a file NAME.onnx for each model; images.json, a list of {path, height, width}; and
// the pixels of image i, uint8 RGB of shape (height, width, 3), in i.rgb. The results are printed
// as JSON: the labels and probabilities of each runtime and model, on these pixels and on those of
// sharp, and how many pixels of sharp differ.

"use strict";

const fs = require("node:fs");
const path = require("node:path");
const sharp = require("sharp");

function readImages(folder) {
  const images = JSON.parse(fs.readFileSync(path.join(folder, "images.json"), "utf8"));
  images.forEach((image, row) => {
    image.pixels = new Uint8Array(fs.readFileSync(path.join(folder, `${row}.rgb`)));
  });
  return images;
}

// Decode an image as docs/export.md does; also return its opacity, from 0 to 255.
async function decode(file) {
  const photograph = sharp(file).rotate().flatten({ background: "white" }).toColorspace("srgb");
  const opacity = sharp(file).rotate().ensureAlpha().extractChannel("alpha");
  const [pixels, alpha] = await Promise.all([photograph.raw().toBuffer(), opacity.raw().toBuffer()]);
  return { pixels: new Uint8Array(pixels), alpha };
}

// Count the pixels that differ, apart for opaque and translucent ones.
function countDifferences(decoded, alpha, pixels, counts) {
  if (decoded.length !== pixels.length || alpha.length * 3 !== pixels.length) {
    throw new Error(`Got ${decoded.length} values of sharp, but expected ${pixels.length}`);
  }
  for (let i = 0; i < alpha.length; i += 1) {
    const kind = alpha[i] === 255 ? counts.opaque : counts.translucent;
    let largest = 0;
    for (let j = 3 * i; j < 3 * i + 3; j += 1) {
      largest = Math.max(largest, Math.abs(decoded[j] - pixels[j]));
    }
    kind.pixels += 1;
    kind.pixels_that_differ += largest > 0 ? 1 : 0;
    kind.largest_difference = Math.max(kind.largest_difference, largest);
  }
}

async function predict(runtime, file, images) {
  const ort = require(runtime);
  // Other numbers of threads sum in another order.
  if (runtime === "onnxruntime-web") ort.env.wasm.numThreads = 1;
  const session = await ort.InferenceSession.create(fs.readFileSync(file), { intraOpNumThreads: 1 });
  const labels = [];
  const probabilities = [];
  for (const { pixels, height, width } of images) {
    const tensor = new ort.Tensor("uint8", pixels, [1, height, width, 3]);
    const outputs = await session.run({ images: tensor });
    labels.push(outputs.label.data[0]);
    probabilities.push(Array.from(outputs.probabilities.data));
  }
  return { labels, probabilities };
}

async function main(folder) {
  const images = readImages(folder);
  const none = { pixels: 0, pixels_that_differ: 0, largest_difference: 0 };
  const counts = { opaque: { ...none }, translucent: { ...none } };
  const decodedImages = [];
  for (const image of images) {
    const { pixels, alpha } = await decode(image.path);
    countDifferences(pixels, alpha, image.pixels, counts);
    decodedImages.push({ ...image, pixels });
  }
  const runs = [
    ["node", "onnxruntime-node", images],
    ["web", "onnxruntime-web", images],
    ["node_with_sharp", "onnxruntime-node", decodedImages],
  ];
  const outputs = {};
  for (const file of fs.readdirSync(folder).filter((name) => name.endsWith(".onnx"))) {
    const model = (outputs[path.basename(file, ".onnx")] = {});
    for (const [run, runtime, inputs] of runs) {
      model[run] = await predict(runtime, path.join(folder, file), inputs);
    }
  }
  const versions = { node: process.versions.node, sharp: sharp.versions.sharp };
  versions.onnxruntime = require("onnxruntime-node").env.versions.node;
  console.log(JSON.stringify({ versions, sharp: counts, outputs }));
}

main(process.argv[2]);
