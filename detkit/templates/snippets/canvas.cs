// Finds products in photos, without detkit:  dotnet run -- photo.jpg [more photos]   (@MODEL@ in the current folder)
// In a new folder:  dotnet new console  , this file as Program.cs, and
//   dotnet add package Microsoft.ML.OnnxRuntime
//   dotnet add package SixLabors.ImageSharp
using System.Globalization;
using Microsoft.ML.OnnxRuntime;
using Microsoft.ML.OnnxRuntime.Tensors;
using SixLabors.ImageSharp;
using SixLabors.ImageSharp.PixelFormats;
using SixLabors.ImageSharp.Processing;

string[] classes = { @CLASSES@ };
const int Width = @WIDTH@, Height = @HEIGHT@; // of the canvas, in pixels
var letterbox = @LETTERBOX@; // whether a photo keeps its shape on it
byte[] fill = { @FILL@ }; // RGB of what it leaves free
const float Lowest = @SCORE@f; // score that is shown

using var session = new InferenceSession(@MODEL@);
foreach (var path in args)
{
    using var photo = Image.Load<Rgb24>(path);
    photo.Mutate(context => context.AutoOrient());
    var pixels = new byte[photo.Height * photo.Width * 3];
    photo.CopyPixelDataTo(pixels);
    double scaleX = (double)Width / photo.Width, scaleY = (double)Height / photo.Height;
    if (letterbox) scaleX = scaleY = Math.Min(scaleX, scaleY);
    int columns = Math.Max(1, (int)Math.Round(photo.Width * scaleX));
    int rows = Math.Max(1, (int)Math.Round(photo.Height * scaleY));
    var small = Resize(pixels, photo.Height, photo.Width, rows, columns);
    var canvas = new byte[3 * Height * Width]; // [3, Height, Width]
    for (var c = 0; c < 3; c++)
        for (var y = 0; y < Height; y++)
            for (var x = 0; x < Width; x++)
                canvas[(c * Height + y) * Width + x] =
                    y < rows && x < columns ? small[(y * columns + x) * 3 + c] : fill[c];
    var images = new DenseTensor<byte>(canvas, new[] { 1, 3, Height, Width });
    using var found = session.Run(
        new[] { NamedOnnxValue.CreateFromTensor("images", images) }, new[] { "boxes", "scores", "labels" });
    var boxes = found[0].AsEnumerable<float>().ToArray();
    var scores = found[1].AsEnumerable<float>().ToArray();
    var labels = found[2].AsEnumerable<long>().ToArray();
    float across = (float)photo.Width / columns, down = (float)photo.Height / rows; // back to pixels of the photo
    for (var i = 0; i < scores.Length; i++)
    {
        float x1 = Math.Clamp(boxes[4 * i] * across, 0, photo.Width);
        float y1 = Math.Clamp(boxes[4 * i + 1] * down, 0, photo.Height);
        float x2 = Math.Clamp(boxes[4 * i + 2] * across, 0, photo.Width);
        float y2 = Math.Clamp(boxes[4 * i + 3] * down, 0, photo.Height);
        if (scores[i] <= 0 || scores[i] < Lowest || x1 >= x2 || y1 >= y2) continue; // a score of 0 is padding
        var box = new[] { x1, y1, x2, y2 }.Select(side => side.ToString("F2", CultureInfo.InvariantCulture));
        var score = scores[i].ToString("F4", CultureInfo.InvariantCulture);
        Console.WriteLine($"{path}\t{classes[labels[i]]}\t{score}\t{string.Join('\t', box)}");
    }
}

// What each pixel of a row or column of `to` pixels takes of one of `from`, and from where on: antialiased bilinear, as
// in training.
static (int First, double[] Parts)[] Weights(int from, int to)
{
    var reach = Math.Max((double)from / to, 1);
    var all = new (int, double[])[to];
    for (var i = 0; i < to; i++)
    {
        var centre = (i + 0.5) * from / to;
        int first = Math.Max(0, (int)(centre - reach + 0.5)), last = Math.Min(from, (int)(centre + reach + 0.5));
        var parts = new double[last - first];
        for (var x = first; x < last; x++) parts[x - first] = Math.Max(0, 1 - Math.Abs((x + 0.5 - centre) / reach));
        var sum = parts.Sum();
        all[i] = (first, parts.Select(part => part / sum).ToArray());
    }
    return all;
}

// Pixels, [height, width, 3], resized to [rows, columns, 3].
static byte[] Resize(byte[] pixels, int height, int width, int rows, int columns)
{
    var across = Weights(width, columns);
    var down = Weights(height, rows);
    var narrow = new byte[height * columns * 3];
    for (var y = 0; y < height; y++)
        for (var x = 0; x < columns; x++)
            for (var c = 0; c < 3; c++)
            {
                var sum = 0.5;
                for (var i = 0; i < across[x].Parts.Length; i++)
                    sum += across[x].Parts[i] * pixels[(y * width + across[x].First + i) * 3 + c];
                narrow[(y * columns + x) * 3 + c] = (byte)sum;
            }
    var small = new byte[rows * columns * 3];
    for (var y = 0; y < rows; y++)
        for (var i = 0; i < columns * 3; i++)
        {
            var sum = 0.5;
            for (var k = 0; k < down[y].Parts.Length; k++)
                sum += down[y].Parts[k] * narrow[(down[y].First + k) * columns * 3 + i];
            small[y * columns * 3 + i] = (byte)sum;
        }
    return small;
}
