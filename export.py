"""Export a model to a file that other runtimes load: ONNX, torch.export, or an AOTInductor package.

    python export.py --resume /runs/evit07/checkpoint.pth --format onnx --output evit07.onnx

The flags of the model are those of main.py; what is not given is read from the checkpoint. The file is compared with
the model before it gets its name. docs/export.md shows how to use it.
"""
if __name__ == '__main__':                             # before the imports, which take seconds: see `start`
    from runtime.program import start
    start('export')

import copy
import json
import os
import sys
import tempfile
from pathlib import Path

import timm
import torch
import torch.nn as nn

from datasets import DIGITS
from evit.reorganization import patches_after
from evit.settings import TokenSettings
from runtime.arguments import ArgumentParser, HelpFormatter, positive, with_dashes
from runtime.checkpoint import load_checkpoint, load_weights, trained_flags
from runtime.compiled_model import check_compiler
from runtime.distributed import cuda_device, parse_device
from runtime.failures import run_program
from runtime.model_factory import add_model_arguments, create_model, fill_model_arguments
from runtime.preprocessing import Preprocessing, input_of
from runtime.utils import InputError, one_line

SUFFIXES = {'onnx': '.onnx', 'pt2': '.pt2', 'aoti': '.pt2'}
TOLERANCE = {'float32': 1e-4, 'float16': 1e-2, 'bfloat16': 1e-1, 'int8': 2e-1}         # of the logits, by the weights


# --- Command line ---------------------------------------------------------------------------------------------------

def get_args_parser():
    parser = ArgumentParser(description='EViT: export', allow_abbrev=False, formatter_class=HelpFormatter)
    _, model = add_model_arguments(parser)
    add = model.add_argument
    add('--resume', metavar='CHECKPOINT', help='file or https address of the weights')
    add('--ema', action='store_true', help='take the moving average of the weights')
    add = parser.add_argument_group('file').add_argument
    add('--format', required=True, choices=[*SUFFIXES], help='pt2: of torch.export; aoti: of AOTInductor, '
        'compiled for the device')
    add('--output', required=True, metavar='FILE', type=Path, help='written when it is complete')
    add('--batch-size', type=positive(int), help='only batches of so many images (default: of any number)')
    add('--normalize', nargs='?', const='bytes', choices=['bytes', 'floats'],
        help='the file normalises the images itself: RGB bytes, or floats from 0 to 1')
    add('--features', action='store_true', help='leave the head out: the output is the pooled features')
    add('--kept', action='store_true', help='more outputs: for each reorganising block, the patches that it kept')
    add('--dtype', default='float32', choices=[*TOLERANCE], help='of the weights; int8: of those '
        'of linear layers, in ONNX')
    add('--device', default='cpu', help='cpu or cuda')
    return parser


def parse_args(argv):
    """The command line as a Namespace, and the checkpoint, None without one. Exits with status 2 on an error."""
    parser = get_args_parser()
    args = parser.parse_args([with_dashes(text) if text.startswith('--') else text for text in argv])
    for wrong, message in ((not (args.resume or args.pretrained), 'give --resume CHECKPOINT or --pretrained'),
                           (args.ema and not args.resume, '--ema needs --resume'),
                           (args.output.suffix != SUFFIXES[args.format],
                            f'--format {args.format}: the name of the file must end in {SUFFIXES[args.format]}'),
                           (args.dtype == 'int8' and args.format != 'onnx', '--dtype int8 goes with --format onnx'),
                           (not args.output.absolute().parent.is_dir(), f'there is no folder {args.output.parent}')):
        if wrong:
            parser.error(message)
    checkpoint = load_checkpoint(args.resume) if args.resume else None
    trained = trained_flags(checkpoint or {})
    fill_model_arguments(args, parser, trained)
    args.is_digits = trained.get('data_set') in DIGITS
    if args.kept and args.base_keep_rate is None:
        parser.error(f'--kept: {args.model} does not reorganise tokens')
    return args, checkpoint


# --- The model ------------------------------------------------------------------------------------------------------

class Exportable(nn.Module):
    """What is exported: normalisation if asked for, the model, and the kept patches if asked for.

    Args:
        model: in eval mode, of any dtype.
        preprocessing: `Preprocessing`.
        normalize: None, 'bytes' or 'floats', what the images are.
        kept: whether to return the kept patches.
    """

    def __init__(self, model, preprocessing, normalize=None, kept=False):
        super().__init__()
        self.model, self.normalize, self.kept = model, normalize, kept
        for name in ('mean', 'std'):
            self.register_buffer(name, torch.tensor(getattr(preprocessing, name)).view(1, 3, 1, 1), persistent=False)

    def forward(self, images):
        """Images (B, 3, H, W) → [logits (B, classes), patches (B, k) for each reorganising block if asked for]."""
        if self.normalize:
            images = ((images.float() / 255 if self.normalize == 'bytes' else images) - self.mean) / self.std
        images = images.to(next(self.model.parameters()).dtype)
        if not self.kept:
            return [self.model(images).float()]
        logits, kept = self.model(images, get_idx=True)
        outputs, patches = [logits.float()], None
        for idx in kept:
            patches = patches_after(patches, idx, self.model.patch_embed.num_patches)
            outputs.append(patches[:, :idx.shape[1]])
        return outputs

    def images(self, batch_size, size, seed=0):
        """Random input (B, 3, S, S)."""
        generator = torch.Generator().manual_seed(seed)
        shape = batch_size, 3, size, size
        if self.normalize == 'bytes':
            images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        else:
            images = (torch.rand if self.normalize else torch.randn)(shape, generator=generator)
        return images.to(self.mean.device)


def build(args, checkpoint):
    """The model that the flags describe, in eval mode, with its weights."""
    classifier = timm.get_pretrained_cfg(args.model).classifier
    classifier = classifier if isinstance(classifier, str) else classifier[0]
    weights, num_classes = None, timm.get_pretrained_cfg(args.model).num_classes
    if checkpoint:
        weights = checkpoint.get('model_ema') if args.ema else checkpoint['model']
        if not weights:
            raise InputError(f'--ema: {args.resume} has no moving average')
        num_classes = len(weights.get(f'{classifier}.weight', ()))
    model = create_model(args.model, pretrained=not weights, input_size=args.input_size,
                         tokens=TokenSettings.of_flags(vars(args)), model_kwargs=args.model_kwargs,
                         num_classes=num_classes)
    if weights:
        load_weights(model, weights, args.resume)
    if args.features:
        model.reset_classifier(0)
    return model.eval()


def metadata_of(args, preprocessing, checkpoint):
    """What a reader of the file has to know, {name: text}; lists are JSON."""
    values = {'model': args.model, 'input_size': args.input_size, 'normalize': args.normalize or 'outside',
              **preprocessing._asdict(), 'classes': (checkpoint or {}).get('classes') or []}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


# --- Formats --------------------------------------------------------------------------------------------------------

def write_onnx(program, path, names, metadata):
    """Write an ONNX file (opset 18)."""
    try:
        import onnxruntime                             # noqa: F401, `open_onnx` uses it
        import onnxscript                              # noqa: F401, torch.onnx uses it
    except ImportError:
        raise InputError('--format onnx needs more packages: pip install -r requirements-export.txt') from None
    exported = torch.onnx.export(program, dynamo=True, opset_version=18, input_names=['images'], output_names=names,
                                 verbose=False)
    exported.model.metadata_props.update(metadata)
    exported.save(path)                                # above 1.5 GiB, the weights go to a second file, `<name>.data`
    return open_onnx(path)


def open_onnx(path):
    """→ a function that runs an ONNX file, and its runtime."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return (lambda images: [torch.from_numpy(output) for output in session.run(None, {'images': images.cpu().numpy()})],
            f'onnxruntime {onnxruntime.__version__}')


def write_int8(program, path, names, metadata):
    """Write an ONNX file whose linear layers have int8 weights and quantise their input as it comes (dynamically)."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        floats = Path(folder) / path.name
        write_onnx(program, floats, names, metadata)
        from onnxruntime.quantization import quantize_dynamic
        quantize_dynamic(floats, path, op_types_to_quantize=['MatMul', 'Gemm'])        # to one file, a quarter as large
    return open_onnx(path)


def write_pt2(program, path, names, metadata):
    """Write a file of torch.export; metadata is its extra file metadata.json."""
    torch.export.save(program, path, extra_files={'metadata.json': json.dumps(metadata)})
    return torch.export.load(path).module(), 'torch.export'


def write_aoti(program, path, names, metadata):
    """Write an AOTInductor package; metadata is that of the loaded package."""
    torch._inductor.aoti_compile_and_package(program, package_path=str(path),
                                             inductor_configs={'aot_inductor.metadata': metadata})
    return torch._inductor.aoti_load_package(str(path)), 'AOTInductor'


# Each returns a function that runs the file, and its runtime
WRITERS = {'onnx': write_onnx, 'onnx int8': write_int8, 'pt2': write_pt2, 'aoti': write_aoti}


# --- Export ---------------------------------------------------------------------------------------------------------

@torch.no_grad()
def write_unchecked(exportable, images, path, format, names=('logits',), metadata={}, dynamic_shapes=None):
    """Write the file for such images; → a function that runs it, and its runtime. Raises InputError."""
    try:
        program = torch.export.export(exportable, (images,), dynamic_shapes=dynamic_shapes)
        return WRITERS[format](program, path, [*names], metadata)
    except InputError:
        raise
    except Exception as error:                         # of many kinds: torch's, of onnxruntime, of the C++ compiler
        raise InputError(f'--format {format}: the model cannot be exported: {one_line(error)}') from None


class InRuntime(nn.Module):
    """A model as the file of a format runs it, in order to measure it.

    Args:
        model: in eval mode; it is not changed.
        format: of WRITERS.
        images: (B, 3, S, S), normalised; the only shape that it takes.
        dtype: of the weights.
    """

    def __init__(self, model, format, images, dtype):
        super().__init__()
        exportable = Exportable(copy.deepcopy(model).to(dtype), Preprocessing()).eval()
        with tempfile.TemporaryDirectory() as folder:
            self.run, _ = write_unchecked(exportable, images, Path(folder) / f'model{SUFFIXES[format]}', format)

    def forward(self, images):
        return self.run(images)[0]


@torch.no_grad()
def write_checked(exportable, output, format, size, metadata, batch_size=None, dtype='float32'):
    """Write the file once it was compared with the model.

    Args:
        exportable: an `Exportable` on its device.
        output: Path; its folder exists.
        format: of WRITERS.
        size: side of the images in pixels.
        metadata: {name: text}.
        batch_size: the only number of images; None for any.
        dtype: of TOLERANCE, that of the weights in the file.
    Returns:
        a line on what was compared.
    Raises:
        InputError: the model cannot be exported, or the exported one differs.
    """
    images = exportable.images(batch_size or 2, size)
    shapes = None if batch_size else ({0: torch.export.Dim('batch')},)
    names = ['logits', *(f'kept_{i}' for i in range(1, len(exportable(images))))]
    with tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix='.export') as folder:
        path = Path(folder) / output.name
        run, runtime = write_unchecked(exportable, images, path, format, names, metadata, shapes)
        compared = compare(exportable, run, size, [batch_size] if batch_size else [1, 3], dtype)
        written = move_files(Path(folder), output)
    if len(written) > 1:                               # ONNX, whose first file names the other: once more in its place
        try:
            compare(exportable, open_onnx(output)[0], size, [batch_size or 1], dtype)
        except Exception as error:
            for file in written:
                file.unlink()
            raise InputError(f'{output} does not load with {written[1].name} beside it: {one_line(error)}') from None
    files = ' and '.join(f'{file}: {file.stat().st_size / 1e6:.1f} MB' for file in written)
    together = ', to be kept together' * (len(written) > 1)
    return f'{files}{together}; {runtime} against torch {torch.__version__}: {compared}'


def move_files(folder, output):
    """Move what a format wrote beside `output`, this file as the last; → the Paths, this one first."""
    others = sorted(output.with_name(file.name) for file in folder.iterdir() if file.name != output.name)
    for file in (*others, output):
        os.replace(folder / file.name, file)
    return [output, *others]


def compare(exportable, run, size, batch_sizes, dtype='float32'):
    """Run both on random images; → what was compared. InputError if they differ.

    Where two tokens have nearly the same score, rounding decides which one is kept; so three draws are tried.
    """
    for seed in range(3):
        worst, same = 0., True
        for batch_size in batch_sizes:
            images = exportable.images(batch_size, size, seed)
            (logits, *kept), (found, *found_kept) = exportable(images), run(images)
            found = found.to(logits)
            worst = max(worst, ((found - logits).abs().max() / logits.abs().max().clamp(min=1)).item())
            same &= torch.equal(found.argmax(1), logits.argmax(1))
            same &= all(torch.equal(one.sort(1).values, other.to(one).sort(1).values)
                        for one, other in zip(kept, found_kept, strict=True))
        if worst <= TOLERANCE[dtype] and (same or dtype != 'float32'):
            break
    else:
        raise InputError(f'the exported model differs: logits by up to {worst:.1e}, '
                         f'{"the same" if same else "not the same"} classes and kept patches; nothing is written')
    what = 'same class' + (' and kept patches' if kept else '')
    return (f'batches of {" and ".join(map(str, batch_sizes))}, outputs differ by up to {worst:.1e}, '
            + (what if same else f'not always the {what}'))


def main(argv=None):
    args, checkpoint = parse_args(sys.argv[1:] if argv is None else argv)
    device = parse_device(args.device)
    if device.type == 'cuda':
        device = cuda_device(device, in_group=False)
    if args.format == 'aoti':
        check_compiler(device)
    preprocessing = input_of(args.model, args.pretrained)[1]
    if args.is_digits:
        preprocessing = preprocessing._replace(crop_pct=1.)                # they are never cropped
    quantized = args.dtype == 'int8'                   # by onnxruntime
    model = build(args, checkpoint).to(device, torch.float32 if quantized else getattr(torch, args.dtype))
    exportable = Exportable(model, preprocessing, args.normalize, args.kept).to(device).eval()
    print(write_checked(exportable, args.output, args.format + ' int8' * quantized, args.input_size,
                        metadata_of(args, preprocessing, checkpoint), args.batch_size, args.dtype))


def run(argv=None):
    """The program, on a command line, by default that of the process."""
    run_program('export.py', main, argv)
