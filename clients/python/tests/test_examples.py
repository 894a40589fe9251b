# SPDX-License-Identifier: Apache-2.0
"""Every example, run as a user runs it, with a random model small enough for a test."""

import pathlib
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    directory = str(tmp_path_factory.mktemp("model"))
    words = {letter: i for i, letter in enumerate(["[UNK]", *map(chr, range(32, 127))])}
    letters = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="[UNK]",
                                         ).save_pretrained(directory)
    torch.manual_seed(7)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=8192,
        bos_token_id=None, eos_token_id=None, pad_token_id=0)).save_pretrained(directory)
    return directory


def run(name, *args, cwd, text=""):
    return subprocess.run([sys.executable, str(EXAMPLES / name), *args], input=text, cwd=cwd,
                          capture_output=True, text=True, timeout=120, check=True).stdout


def test_attend(daemon, tmp_path):
    assert "1000 tokens, out (1, 32, 128)" in run("attend.py", daemon.target, cwd=tmp_path)


def test_shared_prompt_stores_one_copy_and_counts_the_hit(daemon, model_directory, tmp_path):
    first, second, third = run("shared_prompt.py", daemon.target, model_directory,
                               cwd=tmp_path).splitlines()
    stored = int(first.split(" blocks stored")[0].split()[-1])
    assert stored > 0 and first.endswith(" 0 found in the cache"), first
    assert f" {stored} found in the cache" in second, second
    assert int(third.split("with ")[1].split()[0]) == 128 * stored, third


def test_chat_survives_a_killed_service_between_two_turns(daemon, model_directory, tmp_path):
    chat = subprocess.Popen([sys.executable, str(EXAMPLES / "chat.py"), daemon.target,
                             model_directory, "talk"], cwd=tmp_path, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert chat.stdout.readline() == "[0 tokens remembered]\n"
        chat.stdin.write("hello\n")
        chat.stdin.flush()
        assert chat.stdout.readline().startswith("> ")
        daemon.kill()
        daemon.start()
        out, errors = chat.communicate("again\n\n", timeout=60)
    finally:
        chat.kill()
    assert chat.returncode == 0, errors
    assert "[the service was restarted; going on]" in out
    remembered = run("chat.py", daemon.target, model_directory, "talk", cwd=tmp_path, text="\n")
    assert int(remembered[1:].split()[0]) > 80  # two turns of 40 tokens each, and the prompts
