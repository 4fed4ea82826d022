package snapshotter

import (
	"github.com/spf13/pflag"

	"github.com/hearth-serverless/hearth/internal/daemon"
)

// Flags adds what a daemon's user can set to its flags.
func (c *Config) Flags(f *pflag.FlagSet) {
	f.StringVar(&c.Root, "snapshotter-root", "/var/lib/hearth/snapshotter", "folder of layers and snapshots")
	f.StringVar((*string)(&c.Form), "layer-form", string(FormAuto), "keep new layers as one EROFS image each (erofs), as directories (directory), or as what the kernel can (auto)")
	f.Float64Var(&c.MinFreePercent, "min-free", 5, "percent of the snapshotter root's file system, and of its inodes, that pulls leave free: layers that nothing uses are dropped, then pulls are refused; 0 fills it up")
	daemon.BytesVar(f, &c.MaxBytes, "max-bytes", 0, "disk space that all layers together may take, in the same way; 0 is no bound")
}
