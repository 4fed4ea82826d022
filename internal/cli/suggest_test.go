package cli_test

import (
	"encoding/json"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/durationpb"

	hearthv1 "github.com/hearth-serverless/hearth/api/v1alpha1"
)

func TestSuggestRuntime(t *testing.T) {
	f := newFake(t)
	f.imports = &hearthv1.ListImportsResponse{}
	f.want(t, 0, "No start has told yet what it imports", "runtime", "suggest")
	f.want(t, 0, "", "runtime", "apply", "python", "--image", "reg/python:1", "--preload", "flask", "--warm", "2", "--env", "MODE=it's; so")
	f.want(t, 4, "there is no runtime node", "runtime", "suggest", "node")
	module := func(name string, image bool, starts int64, total time.Duration, functions ...string) *hearthv1.ModuleImports {
		return &hearthv1.ModuleImports{Name: name, InImage: image, Starts: starts, Functions: functions, Total: durationpb.New(total)}
	}
	f.imports = &hearthv1.ListImportsResponse{Silent: 2, Runtimes: []*hearthv1.RuntimeImports{
		{Runtime: "gone", Starts: 3},
		{Runtime: "python", Generation: 4, Starts: 10, Functions: []string{"a", "b", "c"}, Modules: []*hearthv1.ModuleImports{
			module("boto3", false, 5, 2*time.Second, "c"), module("numpy", true, 8, 800*time.Millisecond, "a", "b"), module("$(id)", true, 1, time.Second, "c"),
			module("flask", true, 1, time.Second, "c"), module("csv", true, 10, 9*time.Millisecond, "a"),
		}},
	}}
	_, out, errs := f.exec(t, "", "runtime", "suggest")
	for _, want := range []string{
		"Runtime python, generation 4: 10 starts of 3 functions", "preload: [flask, numpy, $(id)]\n",
		"hearth runtime apply python --image reg/python:1 --preload 'flask,numpy,$(id)' --warm 2 --env 'MODE=it'\\''s; so'\n",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("there is no %q in\n%s", want, out)
		}
	}
	if fields := strings.Fields(strings.Split(out, "\n")[3]); !cmp.Equal(fields, []string{"numpy", "2", "8", "0.1000", "0.0800", "yes", "yes"}) {
		t.Errorf("numpy's line is %q", fields)
	}
	if !strings.Contains(errs, "2 nodes did not answer") {
		t.Errorf("of those that are silent it says %q", errs)
	}
	_, out, _ = f.exec(t, "", "runtime", "suggest", "python", "-o", "json")
	var got []struct {
		Runtime string
		Preload []string
		Modules []struct {
			Name     string
			Saves    float64
			Proposed bool
		}
	}
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	if len(got) != 1 || !cmp.Equal(got[0].Preload, []string{"flask", "numpy", "$(id)"}) || len(got[0].Modules) != 5 || got[0].Modules[0].Proposed || got[0].Modules[1].Saves != 0.08 {
		t.Errorf("as JSON %s", out)
	}
	f.imports.Runtimes[1].Modules = f.imports.Runtimes[1].Modules[:1]
	f.want(t, 0, "There is nothing to add to what it preloads.", "runtime", "suggest", "python")
}

// TestDeployCompiles: what is deployed for a Runtime that has booted has the bytecode of its version.
func TestDeployCompiles(t *testing.T) {
	out, err := exec.Command("python3", "-c", "import platform; print(platform.python_version())").Output()
	if err != nil {
		t.Skipf("there is no python3: %v", err)
	}
	version := strings.TrimSpace(string(out))
	f := newFake(t)
	dir := folder(t, map[string]string{"main.py": "def main(r): return 'hello'\n"})
	deployed := func(args ...string) (files map[string]string, said string) {
		t.Helper()
		code, out, errs := f.exec(t, "", append([]string{"deploy", "hello", dir}, args...)...)
		if code != 0 {
			t.Fatalf("exit code %d: %s%s", code, out, errs)
		}
		return packed(t, f.applied.GetFunction().GetSpec().GetCode().GetPackage()), errs
	}
	f.want(t, 0, "", "runtime", "apply", "python", "--image", "reg/python:1")
	if files, said := deployed(); len(files) != 1 || !strings.Contains(said, "is known when it has booted once") {
		t.Errorf("before it has booted: %q, %s", files, said)
	}
	f.runtimes["python"].Status = &hearthv1.RuntimeStatus{Language: "python " + version}
	if files, said := deployed(); len(files) != 2 || !strings.Contains(said, "compiling 1 file for python 3") {
		t.Errorf("compiled: %q, %s", files, said)
	}
	if files, said := deployed("--no-bytecode"); len(files) != 1 || strings.Contains(said, "ytecode") {
		t.Errorf("--no-bytecode: %q, %s", files, said)
	}
	f.runtimes["python"].Status.Language = "python 2.7.18"
	if files, said := deployed(); len(files) != 1 || !strings.Contains(said, "no bytecode, so that each start compiles the code: no compiler: there is no python 2.7 here") {
		t.Errorf("without a compiler: %q, %s", files, said)
	}
	f.runtimes["python"].Status.Language = "ruby 3.2"
	if files, said := deployed(); len(files) != 1 || strings.Contains(said, "ytecode") {
		t.Errorf("of another language: %q, %s", files, said)
	}
}
