package snapshotter

import "github.com/spf13/pflag"

// Flags adds what a daemon's user can set to its flags.
func (c *Config) Flags(f *pflag.FlagSet) {
	f.StringVar(&c.Root, "snapshotter-root", "/var/lib/hearth/snapshotter", "folder of layers and snapshots")
}
