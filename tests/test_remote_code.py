"""A saved folder loads in a fresh process where neither package can be imported, with identical logits."""

import json
import os
import subprocess
import sys

import pytest
import torch

from modeling_xlfa import (
    XLFAConfig,
    XLFAForQuestionAnswering,
    XLFAForSequenceClassification,
    XLFAForTokenClassification,
)

CLEAN_PROCESS = """
import importlib.util, json, sys
assert importlib.util.find_spec("modeling_xlfa") is None and importlib.util.find_spec("xlfa") is None
import torch
from transformers import AutoModel, AutoModelForQuestionAnswering, AutoModelForSequenceClassification
from transformers import AutoModelForTokenClassification
for folder, auto in json.loads(sys.argv[1]):
    model = globals()[auto].from_pretrained(folder, trust_remote_code=True).eval()
    inputs = torch.load(folder + "/inputs.pt", weights_only=True)
    with torch.no_grad():
        output = model(**inputs)
        encoder = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
        states = encoder(**inputs).last_hidden_state
        ids = inputs["input_ids"]
        ot_loss = encoder(source_input_ids=ids, target_input_ids=ids.flip(1)).ot_loss
    logits = output.get("logits", output.get("start_logits"))
    found = {"logits": logits, "states": states, "ot_loss": ot_loss, "kind": [type(encoder).__module__]}
    torch.save(found, folder + "/outputs.pt")
    # What was loaded from a copy can be saved again with its code.
    model.save_pretrained(folder + "/again")
"""


@pytest.fixture(scope="module")
def clean_environment(tmp_path_factory):
    """An interpreter without this checkout on its path: -S drops the editable install, site-packages are added back."""
    home = tmp_path_factory.mktemp("home")
    site = next(path for path in sys.path if path.endswith("site-packages"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    return environment | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": site}


def test_heads_load_from_their_copied_code_in_a_clean_process(bert_config, tmp_path, clean_environment):
    heads = {
        "AutoModelForQuestionAnswering": XLFAForQuestionAnswering,
        "AutoModelForSequenceClassification": XLFAForSequenceClassification,
        "AutoModelForTokenClassification": XLFAForTokenClassification,
    }
    expected, jobs = {}, []
    for name, head in heads.items():
        folder = tmp_path / name
        model = head(XLFAConfig(text_config=bert_config, num_labels=3, ot_epsilon=0.07)).eval()
        model.save_pretrained(folder)
        assert json.loads((folder / "config.json").read_text())["ot_epsilon"] == 0.07
        inputs = {"input_ids": torch.randint(4, 99, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
        torch.save(inputs, folder / "inputs.pt")
        with torch.no_grad():
            output = model(**inputs)
            expected[folder] = (
                output.get("logits", output.get("start_logits")),
                model.xlfa(**inputs).last_hidden_state,
                model.xlfa(source_input_ids=inputs["input_ids"], target_input_ids=inputs["input_ids"].flip(1)).ot_loss,
            )
        jobs.append([str(folder), name])
    subprocess.run(
        [sys.executable, "-S", "-c", CLEAN_PROCESS, json.dumps(jobs)],
        env=clean_environment,
        cwd=tmp_path,
        check=True,
        timeout=280,
    )
    for folder, (logits, states, ot_loss) in expected.items():
        found = torch.load(folder / "outputs.pt", weights_only=True)
        assert torch.equal(found["logits"], logits) and torch.equal(found["states"], states)
        # The installed package may solve with its compiled back end, which the copy does not have.
        torch.testing.assert_close(found["ot_loss"], ot_loss, rtol=1e-4, atol=1e-6)
        assert found["kind"][0].startswith("transformers_modules.")
        again = {path.name for path in (folder / "again").iterdir()}
        transport = {"transport_xlfa.py", "sinkhorn_xlfa.py", "sinkhorn_triton_xlfa.py"}
        assert transport | {"modeling_xlfa.py", "configuration_xlfa.py", "fusion_xlfa.py"} <= again
