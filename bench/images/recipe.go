package images

import (
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"runtime"
	"strings"

	"github.com/hearth-serverless/hearth/runtimes"
)

// builderVersion is part of every cache key: raise it when the builder makes other images of the same recipe.
const builderVersion = 2

//go:embed functions
var functions embed.FS

// recipe says all that an image is made of, so that its hash can stand for the image.
type recipe struct {
	Packages []string // Debian packages over the common base; none for an image from scratch
	Compiler []string // Debian packages present only while Compile runs
	Compile  []string // command, run in appDir, that turns the source there into what the image holds
	Output   string   // glob of what Compile leaves in appDir for the image
	File     string   // the function's file name in the image: under appDir, or in / for an image from scratch
	Source   []byte
	Cmd      []string
	// Runtime names the Runtime whose loader the image starts, in place of a function; none for the others. On names the image
	// whose base and packages its own lie upon, so that nodes keep those once.
	Runtime string            `json:",omitempty"`
	On      string            `json:",omitempty"`
	Loader  map[string][]byte `json:",omitempty"` // sources by path below hearthDir
	// From are the images of whose files one of a certain shape is made; none for the others. Version is raised when the shape
	// changes.
	From    []string `json:",omitempty"`
	Version int      `json:",omitempty"`
}

// appDir is where the function lies in an image that has more than it.
const appDir = "/app"

// hearthDir is where an image has what is Hearth's own in it.
const hearthDir = "/opt/hearth"

// dir is where this image's topmost layer has its files.
func (r recipe) dir() string {
	if r.Runtime != "" {
		return hearthDir
	}
	return appDir
}

// files are the sources that go there, or are compiled there.
func (r recipe) files() map[string][]byte {
	if r.Runtime != "" {
		return r.Loader
	}
	return map[string][]byte{r.File: r.Source}
}

func recipeOf(name string) (recipe, bool) {
	source := func(file string) []byte {
		text, err := functions.ReadFile("functions/" + name + "/" + file)
		if err != nil {
			panic(err) // the file is compiled in, so this is a mistake in this function
		}
		return text
	}
	if runtime, ok := strings.CutPrefix(name, "runtime-"); ok {
		return runtimeRecipe(runtime)
	}
	switch name {
	case "python":
		return recipe{
			Packages: []string{"python3", "python3-numpy", "python3-pandas", "python3-flask"},
			File:     "function.py",
			Source:   source("function.py"),
			Cmd:      []string{"python3", appDir + "/function.py"},
		}, true
	case "java":
		return recipe{
			Packages: []string{"openjdk-17-jre-headless"},
			Compiler: []string{"openjdk-17-jdk-headless"},
			Compile:  []string{"javac", "-Xlint:all", "-Werror", "Function.java"},
			Output:   "*.class",
			File:     "Function.java",
			Source:   source("Function.java"),
			// Without nodelay every answer on a kept connection waits 40 ms for the client's acknowledgement.
			Cmd: []string{"java", "-Dsun.net.httpserver.nodelay=true", "-cp", appDir, "Function"},
		}, true
	case "node":
		return recipe{
			Packages: []string{"nodejs"},
			File:     "function.js",
			Source:   source("function.js"),
			Cmd:      []string{"node", appDir + "/function.js"},
		}, true
	case "flask":
		return recipe{
			Packages: []string{"python3", "python3-flask"},
			File:     "function.py",
			Source:   source("function.py"),
			Cmd:      []string{"python3", appDir + "/function.py"},
		}, true
	case "large-java":
		const library = "/usr/share/kotlin/kotlinc/lib/*"
		return recipe{
			Packages: []string{"openjdk-17-jre-headless", "kotlin"},
			Compiler: []string{"openjdk-17-jdk-headless"},
			Compile:  []string{"javac", "-cp", library, "Compiler.java"},
			Output:   "*.class",
			File:     "Compiler.java",
			Source:   source("Compiler.java"),
			Cmd:      []string{"java", "-Dsun.net.httpserver.nodelay=true", "-cp", appDir + ":" + library, "Compiler"},
		}, true
	case "go":
		return recipe{File: "function", Source: source("main.go"), Cmd: []string{"/function"}}, true
	case "pause":
		return recipe{File: "pause", Source: runtimes.Pause(), Cmd: []string{"/pause"}}, true
	case "fat":
		return recipe{From: []string{"go", "java", "node"}, Version: 1, Cmd: []string{"/function"}}, true
	case "layers":
		return recipe{From: []string{"python"}, Version: 1, Cmd: []string{"python3", appDir + "/function.py"}}, true
	case "smallfiles":
		return recipe{From: []string{"go", "python"}, Version: 1, Cmd: []string{"/function"}}, true
	case "torture":
		return recipe{From: []string{"go"}, Version: 3, Cmd: []string{"/function"}}, true
	}
	return recipe{}, false
}

// key names a cached image: it changes with everything that the image is made of and that this program decides.
func (r recipe) key() string {
	parts := []any{r, base(), runtime.Version()}
	below := r.From
	if r.On != "" {
		below = []string{r.On}
	}
	for _, name := range below {
		if from, ok := recipeOf(name); ok {
			parts = append(parts, from.key())
		}
	}
	return key(parts...)
}

// key hashes parts together with the builder's version and the machine's architecture.
func key(parts ...any) string {
	text, err := json.Marshal(parts)
	if err != nil {
		panic(err) // parts are plain structs of this package
	}
	sum := sha256.Sum256(fmt.Appendf(text, "\n%d %s", builderVersion, runtime.GOARCH))
	return hex.EncodeToString(sum[:8])
}
