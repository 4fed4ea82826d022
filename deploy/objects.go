package deploy

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"
)

// Tag of the images that the manifests name, as hearth/NAME:dev. Nobody publishes such: who deploys puts others in their place.
const Tag = "dev"

// Objects are all that Hearth is on a cluster, in the order in which they are to be applied: what `kubectl kustomize deploy/base`
// prints. The images hearth/NAME are replaced by the references that images has for them; others stay. The caller owns the objects.
func Objects(images map[string]string) ([]map[string]any, error) { return objects("base", images) }

// Unregister is the DaemonSet that gives nodes back as they were, once Instances and nodeagent are gone. A node is done when its pod is
// ready.
func Unregister(images map[string]string) ([]map[string]any, error) {
	return objects("uninstall", images)
}

func objects(dir string, images map[string]string) ([]map[string]any, error) {
	objects, err := kustomized(dir)
	if err != nil {
		return nil, fmt.Errorf("objects to deploy: %w", err)
	}
	replace := map[string]string{}
	for name, ref := range images {
		replace[name+":"+Tag] = ref
	}
	for _, o := range objects {
		replaceIn(o, replace)
	}
	return objects, nil
}

// kustomized reads the files and folders that a folder's kustomization lists. What is embedded needs nothing else of kustomize's.
func kustomized(dir string) ([]map[string]any, error) {
	var k struct{ Resources []string }
	text, err := manifests.ReadFile(path.Join(dir, "kustomization.yaml"))
	if err != nil {
		return nil, err
	}
	if err := yaml.Unmarshal(text, &k); err != nil {
		return nil, fmt.Errorf("kustomization of %s: %w", dir, err)
	}
	var objects []map[string]any
	for _, r := range k.Resources {
		var more []map[string]any
		if name := path.Join(dir, r); strings.HasSuffix(name, ".yaml") {
			more, err = documents(name)
		} else {
			more, err = kustomized(name)
		}
		if err != nil {
			return nil, err
		}
		objects = append(objects, more...)
	}
	return objects, nil
}

func documents(name string) ([]map[string]any, error) {
	text, err := manifests.ReadFile(name)
	if err != nil {
		return nil, err
	}
	var objects []map[string]any
	for r := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(text))); ; {
		document, err := r.Read()
		if errors.Is(err, io.EOF) {
			return objects, nil
		}
		var o map[string]any
		if err == nil {
			err = yaml.UnmarshalStrict(document, &o)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if o != nil { // nothing but comments
			objects = append(objects, o)
		}
	}
}

// replaceIn replaces whole strings, wherever in an object: images stand in containers and in poolmanager's environment.
func replaceIn(value any, replace map[string]string) any {
	switch v := value.(type) {
	case string:
		if to, ok := replace[v]; ok {
			return to
		}
	case []any:
		for i := range v {
			v[i] = replaceIn(v[i], replace)
		}
	case map[string]any:
		for key := range v {
			v[key] = replaceIn(v[key], replace)
		}
	}
	return value
}
