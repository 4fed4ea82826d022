package store_test

import (
	"bufio"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
	"github.com/hearth-serverless/hearth/pool/store"
)

const childEnv = "HEARTH_STORE_TEST_CHILD"

func TestMain(m *testing.M) {
	if path := os.Getenv(childEnv); path != "" {
		writeForEver(path)
		return
	}
	os.Exit(m.Run())
}

func record(name string, serial int64) store.Record {
	return store.Record{Name: name, Serial: serial,
		Function: &hearthv1.Function{Name: name, Spec: &hearthv1.FunctionSpec{Image: fmt.Sprintf("image:%d", serial), Env: map[string]string{"A": "1"}}},
		Revision: &hearthv1.Revision{Name: fmt.Sprintf("%s-%05d", name, serial), Function: name}}
}

func open(t *testing.T, path string) *store.Store {
	t.Helper()
	s, err := store.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func shut(t *testing.T, s *store.Store) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestKeepsWhatItWasGiven(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new", "pool.db")
	s := open(t, path)
	for _, r := range []store.Record{record("a", 1), record("b", 4), record("a", 2)} {
		if err := s.Put(r); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(s.Delete("b"), s.Delete("never")); err != nil {
		t.Fatal(err)
	}
	shut(t, s)
	s = open(t, path)
	defer shut(t, s)
	got, err := s.Records()
	if err != nil || len(got) != 2 {
		t.Fatalf("%v %v", got, err)
	}
	want := record("a", 2)
	if got[0].Serial != 2 || !proto.Equal(got[0].Function, want.Function) || !proto.Equal(got[0].Revision, want.Revision) {
		t.Errorf("a is %v", got[0])
	}
	if got[1].Name != "b" || got[1].Serial != 4 || got[1].Function != nil || got[1].Revision != nil {
		t.Errorf("b is %v", got[1])
	}
	if s.Put(store.Record{Name: "x"}) == nil {
		t.Error("a record without a function was stored")
	}
}

func TestKeepsRuntimes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pool.db")
	s := open(t, path)
	python := store.Runtime{Name: "python", Generation: 3, Image: "python@sha256:1",
		Applied: &hearthv1.Runtime{Name: "python", Image: "python:1", Preload: []string{"numpy"}, Warm: 2, Generation: 3}}
	for _, r := range []store.Runtime{{Name: "node", Generation: 7, Applied: &hearthv1.Runtime{Name: "node", Image: "node"}}, python, {Name: "node", Generation: 7}} {
		if err := s.PutRuntime(r); err != nil {
			t.Fatal(err)
		}
	}
	for _, bad := range []store.Runtime{{}, {Name: "x"}, {Name: "x", Generation: 1, Applied: &hearthv1.Runtime{Name: "y", Image: "a"}}} {
		if s.PutRuntime(bad) == nil {
			t.Errorf("%v was stored", bad)
		}
	}
	shut(t, s)
	s = open(t, path)
	defer shut(t, s)
	got, err := s.Runtimes()
	if err != nil || len(got) != 2 {
		t.Fatalf("%v %v", got, err)
	}
	if got[0].Name != "node" || got[0].Generation != 7 || got[0].Applied != nil {
		t.Errorf("what was deleted: %v", got[0])
	}
	if got[1].Image != python.Image || got[1].Generation != 3 || !proto.Equal(got[1].Applied, python.Applied) {
		t.Errorf("python: %v", got[1])
	}
}

func TestTermsOnlyGrow(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pool.db")
	var last int64
	for _, after := range []int64{0, 0, 70, 0, 3} {
		s := open(t, path)
		got, err := s.BeginTerm(after)
		if err != nil || got <= last || got <= after {
			t.Errorf("term %d after %d and %d: %v", got, last, after, err)
		}
		last = got
		shut(t, s)
	}
}

func TestTwoProcesses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pool.db")
	s := open(t, path)
	defer shut(t, s)
	if _, err := store.Open(path); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("the second: %v", err)
	}
}

// TestDamage changes, cuts and fills files: Open says so, or what it returns is what was written. It never panics.
func TestDamage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pool.db")
	s := open(t, path)
	for i := range 50 {
		if err := s.Put(record(fmt.Sprintf("f%d", i), 1)); err != nil {
			t.Fatal(err)
		}
	}
	shut(t, s)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	for round := range 300 {
		bad := append([]byte(nil), good...)
		switch round % 3 {
		case 0:
			bad = bad[:r.IntN(len(bad))]
		case 1:
			for range 1 + r.IntN(20) {
				bad[r.IntN(len(bad))] ^= byte(1 + r.IntN(255))
			}
		case 2:
			page := r.IntN(len(bad)/4096) * 4096
			clear(bad[page : page+4096])
		}
		damaged := filepath.Join(t.TempDir(), "pool.db")
		if err := os.WriteFile(damaged, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		checkDamaged(t, round, damaged)
	}
}

func checkDamaged(t *testing.T, round int, path string) {
	s, err := store.Open(path)
	if err != nil {
		if errors.Is(err, store.ErrCorrupt) && !strings.Contains(err.Error(), "move the file away") {
			t.Errorf("round %d: no next step: %v", round, err)
		}
		return
	}
	defer func() { _ = s.Close() }()
	records, err := s.Records()
	if err != nil {
		return
	}
	for _, got := range records {
		if want := record(got.Name, 1); got.Function != nil && !proto.Equal(got.Function, want.Function) {
			t.Errorf("round %d: %v is not what was written", round, got)
		}
	}
}

// writeForEver is a child that tells each change when it is durable.
func writeForEver(path string) {
	s, err := store.Open(path)
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	for i := int64(1); ; i++ {
		if err := s.Put(record("f", i)); err != nil {
			os.Exit(1)
		}
		fmt.Println(i)
	}
}

func TestKill(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pool.db")
	var last int64
	for round := range 10 {
		child := exec.Command(os.Args[0])
		child.Env = append(os.Environ(), childEnv+"="+path)
		out, err := child.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for n := 0; n <= round*3 && lines.Scan(); n++ {
			if _, err := fmt.Sscan(lines.Text(), &last); err != nil {
				t.Fatalf("child says %q", lines.Text())
			}
		}
		if err := child.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		for lines.Scan() {
			if _, err := fmt.Sscan(lines.Text(), &last); err != nil {
				break
			}
		}
		_ = child.Wait() // killed
		s := open(t, path)
		got, err := s.Records()
		if err != nil || len(got) != 1 || got[0].Serial < last || got[0].Serial > last+1 {
			t.Errorf("round %d: %v %v, the child said %d", round, got, err, last)
		}
		shut(t, s)
	}
}
