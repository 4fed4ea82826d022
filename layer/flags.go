package layer

import (
	"github.com/spf13/pflag"

	"github.com/hearth-serverless/hearth/internal/daemon"
)

// Flags adds the limits to a daemon's flags.
func (l *Limits) Flags(f *pflag.FlagSet) {
	daemon.BytesVar(f, &l.MaxBytes, "layer-max-bytes", 0, "refuse a layer that unpacks to more; 0 is the default, 64 GiB")
	f.Int64Var(&l.MaxRatio, "layer-max-ratio", 0, "refuse a layer that unpacks to so many times its size; 0 is the default, 200")
	f.Int64Var(&l.MaxEntries, "layer-max-entries", 0, "refuse a layer with more files; 0 is the default, 5 million")
}
