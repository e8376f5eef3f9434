import pytest

from benchmarks import preset_costs


@pytest.fixture(scope='module')
def costs():
    pair = preset_costs.PAIRS['DeepPCB']._replace(size=64, batch=2)
    return preset_costs.measure(pair, 1, ['fitnet', 'dist'])


def test_measures_student_teacher_and_presets(costs):
    assert list(costs) == [preset_costs.ALONE, preset_costs.TEACHER, 'fitnet', 'dist']
    assert costs['alone']['time'] == 1
    for name in ('alone', preset_costs.TEACHER, 'fitnet'):
        assert costs[name]['seconds'] == pytest.approx(costs[name]['time'] * costs['alone']['seconds'])
    assert "preset='dist' is a method for segmentation and classification" in costs['dist']['error']


def test_table_has_a_column_per_pair(costs):
    rows = preset_costs.table(dict(DeepPCB=costs, CamVid=dict(alone=dict(seconds=0.5, time=1.0))))
    assert [row['method'] for row in rows] == ['alone', preset_costs.TEACHER, 'fitnet']
    assert [row['CamVid (s)'] for row in rows] == ['0.5 (1.00)', '–', '–']
    assert all(set(row) == {'method', 'DeepPCB (s)', 'CamVid (s)'} for row in rows)
