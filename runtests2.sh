. /tmp/sv2/env.sh
$PY -m pytest -n 0 -v --durations=0 tests/serving/test_vllm.py -k "nemotron or pairs or loads" > /tmp/sv2/t_vllm2.log 2>&1
$PY -m pytest -n 0 -v --durations=0 tests/serving/test_vllm.py -k "not nemotron and not pairs and not loads" > /tmp/sv2/t_vllm3.log 2>&1
