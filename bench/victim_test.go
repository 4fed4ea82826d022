package bench

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestWhatIsLeftIsSeen(t *testing.T) {
	set := func(names ...string) map[string]bool {
		out := map[string]bool{}
		for _, name := range names {
			out[name] = true
		}
		return out
	}
	before := possessions{files: set("layers/pause"), open: set("metadata.db"), mount: set("/a"), fds: 10}
	if left := before.beyond(before); len(left) != 0 {
		t.Errorf("nothing changed, and %q is left", left)
	}
	after := possessions{files: set("layers/pause", "staging/1"), open: set("metadata.db", "staging/1/fs/x"), mount: set("/a", "/b"), fds: 100}
	want := []string{"file staging/1", "open file staging/1/fs/x", "mount /b", "100 open files, before 10"}
	if diff := cmp.Diff(want, after.beyond(before)); diff != "" {
		t.Errorf("left (-want +got):\n%s", diff)
	}
}

func TestOpenFilesAreFound(t *testing.T) {
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "held"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	open, all, err := openBelow(os.Getpid(), dir)
	if err != nil || !open[f.Name()] || len(open) != 1 || all < 4 {
		t.Errorf("open below %s: %v, %d in all, %v", dir, open, all, err)
	}
}

func TestUsageOfAProcess(t *testing.T) {
	self := os.Getpid()
	before, err := written(self)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(t.TempDir(), "file"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if after, err := written(self); err != nil || after-before < 1<<20 {
		t.Errorf("%v bytes were counted of 1 MiB, %v", after-before, err)
	}
	if one, err := cpuSeconds([]int{self}); err != nil || one < 0 {
		t.Errorf("processor time %v, %v", one, err)
	}
	const nobody = 1 << 30
	if _, err := cpuSeconds([]int{self, nobody}); err == nil {
		t.Error("a process that does not exist has processor time")
	}
}

func TestFaultsAreChosen(t *testing.T) {
	for _, want := range []string{"none", "429", "reset", "corrupt", "disk-full", "kill-containerd"} {
		if !slices.Contains(Faults(), want) {
			t.Errorf("%s is not among %q", want, Faults())
		}
	}
	o := Options{Faults: []string{"flood"}}
	if err := o.checkFaults(); err == nil || !strings.Contains(err.Error(), "flood") {
		t.Errorf("error %v", err)
	}
}
