package trace_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hearth-serverless/hearth/prefetch/trace"
)

// patience is for what the kernel and another goroutine bring about; a test that needs all of it has failed.
const patience = 2 * time.Minute

func TestFanotifySeesWhatIsOpened(t *testing.T) {
	tr := newTracer(t, trace.Fanotify)
	if tr.Method() != trace.Fanotify {
		t.Fatalf("method %s", tr.Method())
	}
	for which, top := range hierarchies(t) {
		group := cgroup(t, top, "hearth-trace-opened")
		below := cgroup(t, group, "below")
		other := cgroup(t, top, "hearth-trace-not-opened")
		for name, at := range places(t, tree(t, "a", "b", "c", "d")) {
			t.Run(which+"/"+name, func(t *testing.T) {
				for _, name := range []string{"a", "b", "c", "d"} {
					warm(t, filepath.Join(at.root, name)) // a page that is written yet cannot leave
					cold(t, filepath.Join(at.root, name))
				}
				through := func(name string) string { return filepath.Join(at.through, name) }
				r := begin(t, tr, []string{group}, []string{at.root})
				heldChild(t, []string{group}, "read="+through("a"))
				heldChild(t, []string{other}, "read="+through("c"))
				r.Ready()
				heldChild(t, []string{below}, "pread="+through("b"))
				got := end(t, r)
				for name, want := range map[string]bool{"a": false, "b": true} {
					accesses := of(t, got, filepath.Join(at.root, name))
					sound(t, accesses, 64*page)
					if !has(accesses, 40*page) {
						t.Errorf("%s was not seen, but %+v", name, accesses)
					}
					for _, a := range accesses {
						if a.Ready != want {
							t.Errorf("%s: %+v", name, a)
						}
					}
				}
				for _, name := range []string{"c", "d"} {
					if a := of(t, got, filepath.Join(at.root, name)); len(a) > 0 {
						t.Errorf("%s was seen, which the cgroup did not open: %+v", name, a)
					}
				}
			})
		}
	}
}

// TestFanotifyFindsLaterOverlays mounts an overlay while it is recorded, as a container's root is.
func TestFanotifyFindsLaterOverlays(t *testing.T) {
	tr := newTracer(t, trace.Fanotify)
	group := cgroup(t, someHierarchy(t), "hearth-trace-later")
	root := tree(t, "a")
	r := begin(t, tr, []string{group}, []string{root})
	at := overlay(t, root)
	var st unix.Stat_t
	if err := unix.Stat(at, &st); err != nil {
		t.Fatal(err)
	}
	marked := fmt.Sprintf("sdev:%x ", unix.Major(st.Dev)<<20|unix.Minor(st.Dev))
	for deadline := time.Now().Add(patience); !strings.Contains(marks(t), marked); {
		if time.Now().After(deadline) {
			t.Fatalf("no mark %q among\n%s", marked, marks(t))
		}
	}
	heldChild(t, []string{group}, "read="+filepath.Join(at, "a"))
	if got := end(t, r); !has(of(t, got, filepath.Join(root, "a")), 40*page) {
		t.Errorf("not seen, but %+v", got.Accesses)
	}
}

// marks are those of this process's fanotify groups.
func marks(t *testing.T) string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for _, e := range entries {
		if to, err := os.Readlink(filepath.Join("/proc/self/fd", e.Name())); err == nil && strings.Contains(to, "fanotify") {
			text, _ := os.ReadFile(filepath.Join("/proc/self/fdinfo", e.Name()))
			out.Write(text)
		}
	}
	return out.String()
}

func FuzzParseOpens(f *testing.F) {
	one := []byte{24, 0, 0, 0, 3, 0, 24, 0, 32, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 9, 0, 0, 0}
	f.Add(one)
	f.Add(append(append([]byte{}, one...), one...))
	f.Add([]byte{0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		n, ok := trace.ParseOpens(b)
		if n*24 > len(b) || ok && n == 0 && len(b) > 0 {
			t.Errorf("%d events, %v, of %d bytes", n, ok, len(b))
		}
	})
}
