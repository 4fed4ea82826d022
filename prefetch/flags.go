package prefetch

import (
	"github.com/spf13/pflag"

	"github.com/hearth-serverless/hearth/internal/daemon"
)

// Flags defines the flags of what people may want to set.
func (c *Config) Flags(f *pflag.FlagSet) {
	f.StringVar((*string)(&c.Mode), "prefetch", string(ModeProfile), "what is read ahead of a start: profile (what earlier starts of the image have needed, which is recorded), whole (all of the image), none (and nothing is recorded)")
	daemon.BytesVar(f, &c.Budget, "prefetch-budget", 0, "bytes that are read ahead of one start at most (0: 256MiB, and all with --prefetch whole)")
	daemon.BytesVar(f, &c.Keep, "prefetch-keep", 128<<20, "memory for what several images of the node need at their starts, which is kept in it until the node is short of memory (0: nothing is kept)")
}
