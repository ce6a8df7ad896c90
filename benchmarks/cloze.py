"""Small downstream tasks, made by rules from held-out documents, for the runs of a sweep.

    pip install -r requirements-eval.txt
    python -m benchmarks.cloze --config=configs/equivalence.py --workdir=runs/equivalence

Every question shows a place in a validation document, which no run was trained on, and asks what
comes next; the answers are

    word         the word there, or another word of as many letters out of the same document
    bracket      ), ] or }; as many questions of each
    indentation  the next line as it is indented, or four or eight columns more or less

The tasks are written to DIR/tasks, run as local tasks of the lm-evaluation-harness on every run of
the sweep that is done, and written to DIR/cloze.csv: the share of right answers and its standard
error over the questions, run by run.  What is printed compares settings with the sweep's baseline,
pair by pair: the mean difference and Student's 95 % interval over the pairs.  Documents without
brackets or indented lines yield fewer tasks.
"""

from absl import flags

from benchmarks import cloze_tasks
from benchmarks.cloze_tasks import Row
from caat_jax import command_line
from caat_jax.checkpoints import checkpoints
from caat_jax.config import user_paths
from caat_jax.data.corpora import open_corpus
from caat_jax.errors import InputError
from caat_jax.sweep import plan as sweep_plan
from caat_jax.sweep.plan import Plan
from caat_jax.sweep.report import RESULT_FILE, run_folder

_CONFIG = command_line.config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "That of the sweep.", required=True)
_LIMIT = flags.DEFINE_integer("limit", None, "Only so many questions of each task.", 1)


def main(plan: Plan) -> None:
    from caat_jax.evaluation import harness

    workdir = user_paths.expanded("--workdir", _WORKDIR.value)
    done = [run for run in plan.runs if (run_folder(workdir, run) / RESULT_FILE).exists()]
    if not done:
        raise InputError(f"--workdir={workdir} has no run of this configuration that is done")
    documents = list(open_corpus(done[0].config.data).documents("validation"))
    names = cloze_tasks.write_tasks(cloze_tasks.questions_of(documents), workdir / "tasks")
    options = harness.TaskOptions(tuple(names), workdir / "tasks", None, _LIMIT.value, None)
    rows = []
    for run in done:
        step, config = checkpoints.newest_config(run_folder(workdir, run))
        figures, _ = harness.evaluate_tasks(run_folder(workdir, run), step, config, options)
        for name in names:
            found = figures[name]
            share, error = (found["metrics"][f"{key},none"] for key in ("acc", "acc_stderr"))
            rows.append(Row(run.setting, run.seed, name, found["examples"], share, error))
        cloze_tasks.write_csv(workdir / "cloze.csv", plan, rows)
    print(cloze_tasks.table(plan, rows))


if __name__ == "__main__":
    command_line.run(main, _CONFIG, sweep_plan.resolve, sweep_plan.all_fields)
