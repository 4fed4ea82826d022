# Compiles the loader of the java Runtime in the folder of its sources, and leaves in out/ what the image holds. Needs a JDK and a C
# compiler; the archive of classes is for the very files and paths of the image, so this has to run where they are in it.
set -eu
home=$(dirname "$(dirname "$(readlink -f "$(command -v javac)")")")
mkdir -p classes/loader classes/warm out

javac -Xlint:all,-processing,-options,-serial -d classes/loader com/google/cloud/functions/*.java io/cloudevents/*.java hearth/*.java
javac -Xlint:all -cp classes/loader -d classes/warm warm/*.java
cc -O2 -Wall -Werror -shared -fPIC -I "$home/include" -I "$home/include/linux" -o out/libloader.so loader.c

printf 'Main-Class: hearth.Loader\nAdd-Opens: java.base/java.lang java.base/java.util java.base/java.util.concurrent\n' >manifest
jar --create --file out/loader.jar --manifest manifest -C classes/loader .
jar --create --file out/warm.jar -C classes/warm .
cp java.options out/

# As the image has them: the archive holds paths and times of the jars. The time is that of all files of such layers.
for file in out/*; do touch -d 2020-01-01T00:00:00Z "$file"; cp -p "$file" .; done
grep -v SharedArchiveFile java.options >training.options
HEARTH_PRELOAD=$(paste -sd, preload) java @training.options -XX:ArchiveClassesAtExit=out/loader.jsa -jar "$PWD/loader.jar" train
touch -d 2020-01-01T00:00:00Z out/loader.jsa
