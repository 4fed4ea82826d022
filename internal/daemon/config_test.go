package daemon_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/hearth-serverless/hearth/internal/daemon"
)

type settings struct {
	config, word string
	wait         time.Duration
	hosts        []string
	labels       map[string]string
	n            int
}

func newFlags() (*pflag.FlagSet, *settings) {
	s := &settings{}
	f := pflag.NewFlagSet("test", pflag.ContinueOnError)
	f.StringVar(&s.config, "config", "", "")
	f.StringVar(&s.word, "the-word", "default", "")
	f.DurationVar(&s.wait, "wait", time.Second, "")
	f.StringSliceVar(&s.hosts, "hosts", []string{"first"}, "")
	f.StringToStringVar(&s.labels, "labels", nil, "")
	f.IntVar(&s.n, "n", 1, "")
	return f, s
}

func env(pairs map[string]string) func(string) (string, bool) {
	return func(name string) (string, bool) { v, ok := pairs[name]; return v, ok }
}

func TestPrecedence(t *testing.T) {
	file := filepath.Join(t.TempDir(), "c.yaml")
	write(t, file, "the-word: file\nwait: 3s\nn: 7\nhosts: [a, b]\nlabels: {x: y}\n")
	f, s := newFlags()
	if err := f.Parse([]string{"--the-word=flag"}); err != nil {
		t.Fatal(err)
	}
	err := daemon.Configure(f, env(map[string]string{"HEARTH_CONFIG": file, "HEARTH_THE_WORD": "env", "HEARTH_WAIT": "2s"}))
	if err != nil {
		t.Fatal(err)
	}
	if s.word != "flag" || s.wait != 2*time.Second || s.n != 7 {
		t.Errorf("word %q from the flag, wait %s from the environment, n %d from the file", s.word, s.wait, s.n)
	}
	if strings.Join(s.hosts, ",") != "a,b" || s.labels["x"] != "y" {
		t.Errorf("hosts %v, labels %v", s.hosts, s.labels)
	}
}

func TestConfigErrors(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"unknown key", "n: 1\nother: 2\n", `line 2: unknown key "other"`},
		{"twice", "n: 1\nn: 2\n", `"n" is there twice`},
		{"not a mapping", "- a\n", "must be a mapping"},
		{"bad value", "n: many\n", `key "n"`},
		{"no value", "n:\n", "has no value"},
		{"list for one", "n: [1]\n", "not a list"},
		{"nested", "hosts: [[a]]\n", "plain value"},
		{"alias", "the-word: &a x\nhosts: *a\n", "plain value"},
		{"config in itself", "config: x\n", "unknown key"},
		{"no yaml", "\t:", "yaml"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, _ := newFlags()
			err := daemon.ApplyConfig(f, []byte(c.text), map[string]bool{})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func TestConfigFileMissingAndBadEnvironment(t *testing.T) {
	f, _ := newFlags()
	if err := daemon.Configure(f, env(map[string]string{"HEARTH_CONFIG": "/does/not/exist"})); err == nil || !strings.Contains(err.Error(), "/does/not/exist") {
		t.Errorf("got %v", err)
	}
	f, _ = newFlags()
	if err := daemon.Configure(f, env(map[string]string{"HEARTH_N": "x"})); err == nil || !strings.Contains(err.Error(), "HEARTH_N") {
		t.Errorf("got %v", err)
	}
}

func FuzzConfig(f *testing.F) {
	for _, seed := range []string{"n: 1", `{"wait": "3s", "hosts": ["a"]}`, "labels: {a: b}", "a: &x [*x]", "? [a]\n: b", "", "n: 1\n---\nn: 2"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		flags, s := newFlags()
		err := daemon.ApplyConfig(flags, data, map[string]bool{"n": true})
		if s.n != 1 {
			t.Fatalf("a given flag was changed to %d", s.n)
		}
		if err == nil && len(data) > 1<<20 {
			t.Fatal("took a file that is too large")
		}
	})
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
