package prefetch

import (
	"log/slog"

	"github.com/hearth-serverless/hearth/prefetch/trace"
)

// Tracer records what containers read.
type Tracer interface {
	// Begin records for these absolute cgroup directories, from files on the file systems that these trees are on.
	Begin(cgroups, roots []string) (Recording, error)
}

// Recording is one under way.
type Recording interface {
	// Ready says that what comes now is not needed for getting ready.
	Ready()
	// End ends it, whatever it returns.
	End() (trace.Trace, error)
}

// kernel is the Tracer that the kernel's tracepoints make.
type kernel struct{ tracer *trace.Tracer }

func (k kernel) Begin(cgroups, roots []string) (Recording, error) {
	return k.tracer.Begin(cgroups, roots)
}

// Trace has starts recorded as well as this kernel can; if it cannot, the log says so. What is recorded ends with the process.
func (c *Config) Trace(log *slog.Logger) {
	if c.Mode == ModeNone {
		return
	}
	tracer, err := trace.New(log)
	if err != nil {
		log.Warn("what starts read cannot be recorded: they are helped by what is known already, or shared", "reason", err)
		return
	}
	c.Tracer = kernel{tracer}
}
