"""Write a distillation config from the configs of a student and a teacher."""

import argparse

from mmdiffkd.cli import exit_on_mistake, own_process, without_gc


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('student', help='config of the student: pkg::path or a file')
    parser.add_argument(
        'teacher', help='config of the teacher: pkg::path or a file, or a model of a library, such as timm::resnet50'
    )
    parser.add_argument(
        '--checkpoint',
        help="teacher checkpoint: a path, a URL, 'zoo' for the weights in the model index of mmdet, mmseg or "
        "mmpretrain, or 'pretrained' for the weights of timm, torchvision or transformers (default: zoo or "
        'pretrained, whichever fits the teacher)',
    )
    parser.add_argument('-o', '--output', help='file to write (default: print the config)')
    parser.add_argument(
        '--preset',
        help='distillation method, such as cwd (default: diffkd, the method of the paper, or cosine for a model of a '
        'library)',
    )
    return parser.parse_args()


def main():
    args = parse_args()
    with exit_on_mistake(), without_gc():
        from mmdiffkd.apis import make_config

        text = make_config(args.student, args.teacher, args.checkpoint, args.output, args.preset)
    if args.output is None:
        print(text, end='')
    else:
        print(f'Wrote {args.output}. Check it with tools/analysis_tools/preview.py, then train it with tools/train.py.')


if __name__ == '__main__':
    own_process()
    main()
