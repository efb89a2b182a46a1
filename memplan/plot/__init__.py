"""Pictures of estimates, as matplotlib figures. Nothing here shows a window: save a figure, or display it yourself.

over(model, "rank", [4, 8, 16])     one knob: a line a method, or stacked components
over_rank(model)                    memory against rank
heat_map(model, "seq_len", ..., "micro_batch_size", ...)   two knobs, with the cards' capacities as contours
timeline(model)                     one step: what is alive when
predicted_against_measured(validation)
plan_front(plan)                    dollars against hours
"""

from memplan.plot.accuracy import predicted_against_measured
from memplan.plot.front import plan_front
from memplan.plot.heat import heat_map
from memplan.plot.lines import over, over_rank
from memplan.plot.save import save
from memplan.plot.steps import timeline

__all__ = ["heat_map", "over", "over_rank", "plan_front", "predicted_against_measured", "save", "timeline"]
