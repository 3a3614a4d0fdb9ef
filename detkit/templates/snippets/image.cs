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
const float Lowest = @SCORE@f; // score that is shown

using var session = new InferenceSession(@MODEL@);
foreach (var path in args)
{
    using var photo = Image.Load<Rgb24>(path);
    photo.Mutate(context => context.AutoOrient());
    var pixels = new byte[photo.Height * photo.Width * 3];
    photo.CopyPixelDataTo(pixels);
    var image = new DenseTensor<byte>(pixels, new[] { photo.Height, photo.Width, 3 });
    using var found = session.Run(
        new[] { NamedOnnxValue.CreateFromTensor("image", image) }, new[] { "boxes", "scores", "labels" });
    var boxes = found[0].AsEnumerable<float>().ToArray(); // in pixels of the photo
    var scores = found[1].AsEnumerable<float>().ToArray();
    var labels = found[2].AsEnumerable<long>().ToArray();
    for (var i = 0; i < scores.Length; i++)
    {
        if (scores[i] < Lowest) continue;
        var box = boxes.Skip(4 * i).Take(4).Select(side => side.ToString("F2", CultureInfo.InvariantCulture));
        var score = scores[i].ToString("F4", CultureInfo.InvariantCulture);
        Console.WriteLine($"{path}\t{classes[labels[i]]}\t{score}\t{string.Join('\t', box)}");
    }
}
