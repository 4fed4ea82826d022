package daemon

import (
	"fmt"

	"github.com/docker/go-units"
	"github.com/spf13/pflag"
)

// bytes is a flag's value in bytes: a number, or one with a unit as in 96MiB or 4g, of which each is a power of 1,024.
type bytes int64

// BytesVar defines a flag for a number of bytes, which people may write with a unit.
func BytesVar(f *pflag.FlagSet, p *int64, name string, value int64, usage string) {
	*p = value
	f.Var((*bytes)(p), name, usage)
}

// String implements pflag.Value.
func (b *bytes) String() string {
	for _, unit := range []struct {
		name string
		size bytes
	}{{"GiB", units.GiB}, {"MiB", units.MiB}, {"KiB", units.KiB}} {
		if *b != 0 && *b%unit.size == 0 {
			return fmt.Sprintf("%d%s", *b/unit.size, unit.name)
		}
	}
	return fmt.Sprintf("%d", *b)
}

// Set implements pflag.Value.
func (b *bytes) Set(text string) error {
	n, err := units.RAMInBytes(text)
	if err != nil || n < 0 {
		return fmt.Errorf("%q is no number of bytes: write 100663296, 96MiB or 96m", text)
	}
	*b = bytes(n)
	return nil
}

// Type implements pflag.Value.
func (*bytes) Type() string { return "bytes" }
