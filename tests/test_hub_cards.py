"""What the Hub of the tests says about the metadata of model cards."""

import re

import pytest
from huggingface_hub import ModelCard, create_repo, upload_file

from hub_server import HubServer

REPO = "org/model"
MODEL_INDEX = """
model-index:
- name: model
  results:
  - task: {type: depth-estimation}
    dataset: {type: rooms, name: Rooms}
    metrics: [{type: rmse, value: VALUE}]
"""


class RawCard(ModelCard):
    """Metadata that ModelCard would refuse or repair by itself."""

    def __init__(self, metadata: str) -> None:
        self.metadata = metadata

    def __str__(self) -> str:
        return f"---\n{self.metadata}\n---\n# Model\n"


def test_a_good_card_is_pushed(hub: HubServer) -> None:
    create_repo(REPO)
    metadata = "license: mit\ntags: [depth]\nlanguage: en\nbase_model: [org/base]" + MODEL_INDEX.replace(
        "VALUE", "0.5"
    )
    card = ModelCard(str(RawCard(metadata)))
    card.push_to_hub(REPO)
    assert hub.files(REPO)["README.md"] == str(card).encode()
    loaded = ModelCard.load(REPO).data
    assert loaded.to_dict() == card.data.to_dict()
    assert [result.metric_value for result in loaded.eval_results or []] == [0.5]


def test_a_card_without_metadata_is_taken(hub: HubServer) -> None:
    hub.put(REPO, {})
    upload_file(path_or_fileobj=b"# Model", path_in_repo="README.md", repo_id=REPO)
    upload_file(path_or_fileobj=b"---\n\n---\n", path_in_repo="README.md", repo_id=REPO)
    assert hub.files(REPO) == {"README.md": b"---\n\n---\n"}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("license: [mit]", '"license" must be a string'),
        ("license: null", '"license" must be a string'),
        ("tags: depth", '"tags" must be an array of strings'),
        ("tags: [1]", '"tags" must be an array of strings'),
        ("datasets: {a: b}", '"datasets" must be an array of strings'),
        ("base_model: /a/local/folder", '"base_model" with value "/a/local/folder" is not valid'),
        ("model-index: []", '"model-index" is malformed'),
        ("model-index: [{name: model, results: [{task: {}}]}]", '"model-index" is malformed'),
        (MODEL_INDEX.replace("VALUE", "null"), '"model-index" holds a metric without a value'),
        (MODEL_INDEX.replace("VALUE", "1").replace("type: rooms", "type: 3"), '"model-index" holds 3 where'),
        ("license: 'mit", "Invalid YAML"),
        ("- mit", "The metadata must be a mapping"),
    ],
)
def test_a_card_with_wrong_metadata_is_refused(hub: HubServer, metadata: str, message: str) -> None:
    hub.put(REPO, {})
    card = RawCard(metadata)
    with pytest.raises(ValueError, match=re.escape(message.replace('"', '\\"'))):
        card.push_to_hub(REPO)
    with pytest.raises(ValueError, match=re.escape(message)):
        upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id=REPO)
    assert hub.files(REPO) == {}
