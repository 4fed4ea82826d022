package host_test

import (
	"slices"
	"testing"

	"github.com/hearth-serverless/hearth/internal/host"
)

func TestMountsWithin(t *testing.T) {
	var mounts []host.Mount
	for _, line := range []string{
		"22 1 0:1 / /run/hearth rw - tmpfs tmpfs rw",
		`23 22 0:2 / /run/hearth/a\040b rw,relatime shared:3 - overlay overlay rw,lowerdir=x`,
		"24 22 0:3 / /run/hearth2/c rw - nsfs nsfs rw",
		"25 22 0:3 / /run/hearth/d rw - nsfs nsfs rw",
		"nonsense",
	} {
		if m, ok := host.ParseMount(line); ok {
			mounts = append(mounts, m)
		}
	}
	got := host.MountsWithin(mounts, "/run/hearth")
	if want := []string{"/run/hearth/d", "/run/hearth/a b"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestParseMount(t *testing.T) {
	got, ok := host.ParseMount(`23 22 7:300 / /run/a\040b rw,relatime shared:3 - overlay overlay rw,lowerdir=/x\040y:z`)
	want := host.Mount{Point: "/run/a b", Root: "/", Kind: "overlay", Options: "rw,lowerdir=/x y:z", Device: 0x10072c}
	if !ok || got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func FuzzParseMount(f *testing.F) {
	f.Add(`23 22 0:2 / /run/a\040b rw,relatime shared:3 - overlay overlay rw,lowerdir=x`)
	f.Add(`1 1 1:1 / \777\04 rw - `)
	f.Fuzz(func(t *testing.T, line string) {
		if m, ok := host.ParseMount(line); ok && m.Kind == "" {
			t.Errorf("a mount without a type from %q", line)
		}
	})
}
